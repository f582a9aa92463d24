"""On-policy distillation on tiny models: `from opd_fixtures import another, config, history, rows, trainer`."""

from pathlib import Path
from typing import Any

import torch

from deltalens.train.models import load_model, load_tokenizer
from deltalens.train.tasks import Sums

__all__ = ["another", "config", "history", "rows", "trainer"]


def rows(count: int = 8) -> list[dict[str, Any]]:
    return [
        {"prompt": [{"role": "user", "content": e.prompt}], "answer": e.answer, "domain": "ab"[i % 2]}
        for i, e in enumerate(Sums().train(count))
    ]


def config(folder: Path, **changes: Any) -> Any:
    from deltalens.train.opd import OPDConfig

    return OPDConfig(
        **{
            "output_dir": str(folder),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "max_completion_length": 5,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "bf16": False,
            "use_cpu": True,
            "topk": 8,
            "report_to": [],
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            **changes,
        }
    )


def another(model: Path, seed: int = 1) -> Any:
    """A teacher that differs from the student."""
    teacher = load_model(model, "float32")
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return teacher


def trainer(
    model: Path,
    folder: Path,
    *,
    teacher: Any = None,
    count: int = 8,
    reward: Any = None,
    peft_config: Any = None,
    **changes: Any,
) -> Any:
    from datasets import Dataset

    from deltalens.train.opd import OPDTrainer

    return OPDTrainer(
        model=load_model(model, "float32"),
        teacher_model=another(model) if teacher is None else teacher,
        args=config(folder, **changes),
        train_dataset=Dataset.from_list(rows(count)),
        processing_class=load_tokenizer(model),
        reward=reward,
        peft_config=peft_config,
    )


def history(run: Any, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]
