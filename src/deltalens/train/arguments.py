"""From a run's config to the arguments of TRL's trainers."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, TypeVar

from deltalens.errors import ConfigError
from deltalens.train.config import Run

__all__ = ["trl_arguments"]

T = TypeVar("T")


def trl_arguments(kind: type[T], run: Run, checkpoints: Path, **values: Any) -> T:
    """An instance of a TRL config class.

    Args:
        kind: the method's TRL config class.
        run: our config; `run.trainer` has the last word.
        checkpoints: folder for the trainer's checkpoints.
        values: what the method adds to the arguments that all methods share.

    Raises:
        ConfigError: `run.trainer` names an argument that `kind` does not have, TRL refuses a value, or the step's
            sequences cannot be split over the processes.
    """
    import torch
    from accelerate import PartialState

    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]  # TRL's are dataclasses
    for name in run.trainer:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"trainer: TRL's {kind.__name__} has no argument {name!r}{hint}")
    batch, accumulation = _batches(run, PartialState().num_processes)
    shared: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "max_steps": run.steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": run.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if run.schedule == "constant" else run.schedule,
        "warmup_steps": run.warmup_steps,
        "weight_decay": run.weight_decay,
        "max_grad_norm": run.max_grad_norm,
        "bf16": run.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,  # TRL's default, a fifth slower; `trainer: {gradient_checkpointing: true}`
        "use_cache": True,  # else the trainer turns it off in the config that the model is saved with
        "seed": run.seed,
        "data_seed": run.seed,
        "save_strategy": "steps",
        "save_steps": run.checkpoint_every,
        "save_total_limit": 1,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would show a NaN as the loss before; ours stops the run
        "report_to": run.report_to,
        "disable_tqdm": True,
    }
    try:
        return kind(**{**shared, **values, **run.trainer})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"TRL's {kind.__name__} refuses the config: {' '.join(str(error).split())}") from None


def _batches(run: Run, processes: int) -> tuple[int, int]:
    """Sequences a process takes at a time, and how many times a step."""
    sequences = run.prompts_per_step * run.sequences_per_prompt
    if sequences % processes:
        raise ConfigError(f"a step's {sequences} sequences cannot be split evenly over {processes} processes")
    share = sequences // processes
    batch = run.micro_batch or share
    if share % batch:
        raise ConfigError(f"micro_batch {batch} does not divide a process's share of {share} sequences a step")
    return batch, share // batch
