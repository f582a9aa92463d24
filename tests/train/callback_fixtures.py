"""A tiny model trained on random tokens by the plain HF trainer, with callbacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from deltalens.train.models import quiet_libraries

__all__ = ["Recorder", "make_trainer", "save_rounded"]


def examples(count: int = 16) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 200, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


class Recorder(TrainerCallback):
    """Stands for a reporter: keeps what `on_log` hands it, as W&B's, trackio's and tensorboard's callbacks are told."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append({**logs, "step": state.global_step})


def make_trainer(
    folder: Path, output: Path, callbacks: Sequence[TrainerCallback] = (), *, model: Any = None, **changes: Any
) -> Trainer:
    """Four examples a step, AdamW with a rate at which a bf16 copy moves in some places and not in others."""
    arguments = {
        "output_dir": str(output),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 5e-4,
        "logging_steps": 3,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    with quiet_libraries():
        set_seed(0)
        return Trainer(
            model=model or LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=TrainingArguments(**{**arguments, **changes}),
            train_dataset=examples(),
            callbacks=list(callbacks),
        )


def save_rounded(checkpoint: Path, target: Path) -> Path:
    """A trainer's checkpoint as a bfloat16 folder."""
    LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(target)
    return target
