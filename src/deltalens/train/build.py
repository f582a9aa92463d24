"""From a config to the trainer of its method."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltalens.errors import ConfigError
from deltalens.train.arguments import trl_arguments
from deltalens.train.config import GRPORun, LoRA, OPDRun, OPSDRun, Run, SeqKDRun, TeacherEndpoint
from deltalens.train.contrasts import grpo_trainer, sft_trainer, teacher_replies
from deltalens.train.data import rows
from deltalens.train.models import load_model, load_processor
from deltalens.train.opsd import opsd_trainer
from deltalens.train.progress import Stages
from deltalens.train.restrict import restriction_callback
from deltalens.train.tasks import Example, Task

__all__ = ["build_trainer"]

_OPD_KEYS = (
    "loss",
    "topk",
    "token_share",
    "token_selection",
    "rollout_teacher_share",
    "log_ratio_clip",
    "importance_clip",
    "samples_per_prompt",
    "reward_mix",
    "teacher_column",
)


def build_trainer(
    run: Run,
    source: Path,
    teachers: dict[str, str],
    task: Task,
    examples: Sequence[Example],
    processor: Any,
    folder: Path,
    stages: Stages,
) -> Any:
    """The TRL trainer behind a run, ready to train.

    Args:
        run: the config; its class is the method.
        source: folder of the model to train.
        teachers: folders of local teachers by name.
        task: the scorer.
        examples: the training examples in order.
        processor: the model's tokenizer or processor.
        folder: the run's folder.
        stages: progress of a teacher that generates first.
    """
    from transformers import PrinterCallback

    model = load_model(source, run.weights)
    if not run.train_vision:
        _freeze_vision(model)
    checkpoints, peft = folder / "checkpoints", _peft(run.lora)
    restriction = restriction_callback(run, source, model)
    # A subnetwork's callback wants to be there while the trainer is made; the others are added to it.
    more: dict[str, Any] = {"peft": peft, "callbacks": [] if restriction is None else [restriction]}
    trainer: Any
    if isinstance(run, OPDRun):
        trainer = _opd_trainer(run, model, processor, teachers, task, examples, checkpoints, **more)
    elif isinstance(run, OPSDRun):
        trainer = opsd_trainer(run, model, processor, examples, checkpoints, **more)
    elif isinstance(run, GRPORun):
        trainer = grpo_trainer(run, model, processor, examples, task, checkpoints, **more)
    else:
        if isinstance(run, SeqKDRun):
            with stages.stage("teacher's replies", total=len(examples)) as update:
                examples = teacher_replies(
                    run,
                    Path(teachers[""]),
                    examples,
                    folder / "teacher.jsonl",
                    on_progress=lambda done, _total: update(done, ""),
                )
        trainer = sft_trainer(run, model, processor, examples, checkpoints, **more)
    trainer.remove_callback(PrinterCallback)  # prints every log line as a dict where the trainer has no bar
    if run.geometry_every is not None:
        from deltalens.train.callback import UpdateGeometryCallback

        trainer.add_callback(UpdateGeometryCallback(source, every=run.geometry_every, output=folder))
    return trainer


def _opd_trainer(
    run: OPDRun,
    model: Any,
    processor: Any,
    teachers: dict[str, str],
    task: Task,
    examples: Sequence[Example],
    checkpoints: Path,
    *,
    peft: Any,
    callbacks: list[Any],
) -> Any:
    from deltalens.train.opd import OPDConfig, OPDTrainer
    from deltalens.train.teachers import EndpointTeacher, check_tokenizers

    teacher: Any
    if isinstance(run.teacher, TeacherEndpoint):
        variable = run.teacher.api_key_variable
        if variable is not None and variable not in os.environ:
            raise ConfigError(f"teacher: the environment has no {variable}, where the endpoint's key should be")
        key = None if variable is None else os.environ[variable]
        teacher = EndpointTeacher(run.teacher.url, run.teacher.model, key)
    else:
        for path in teachers.values():
            check_tokenizers(processor, load_processor(Path(path)), (run.model, path))
        loaded = {name: load_model(Path(path), run.teacher_dtype) for name, path in teachers.items()}
        teacher = loaded if run.teachers is not None else loaded[""]

    def reward(reply: str, row: dict[str, Any]) -> float:
        return float(task.score(reply, examples[row["index"]]))

    arguments = trl_arguments(
        OPDConfig,
        run,
        checkpoints,
        max_completion_length=run.max_new_tokens,
        # `temperature` also divides the logits of the loss; only the sampling is to be sharpened.
        temperature=1.0,
        generation_kwargs={"temperature": run.temperature},
        **{name: getattr(run, name) for name in _OPD_KEYS},
    )
    return OPDTrainer(
        model=model,
        teacher_model=teacher,
        args=arguments,
        train_dataset=rows(examples),
        processing_class=processor,
        reward=reward,
        callbacks=callbacks,
        peft_config=peft,
    )


def _peft(lora: LoRA | None) -> Any:
    if lora is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise ConfigError("lora: needs PEFT; pip install 'deltalens[peft]'") from None
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def _freeze_vision(model: Any) -> None:
    """No gradients in the vision tower; its connector to the text model goes on learning."""
    from deltalens.checkpoint.roles import role_of

    frozen = [
        parameter
        for name, parameter in model.named_parameters()
        if (role := role_of(name)[0]).startswith("vision.") and role != "vision.projector"
    ]
    if not frozen:
        raise ConfigError("train_vision is false, but the model has no vision tower")
    for parameter in frozen:
        parameter.requires_grad_(False)
