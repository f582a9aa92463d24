"""A training run: a config in, a folder out that says everything about it.

    DIR/manifest.json   config, versions, hashes of data, model and teacher; `finished` once it is
    DIR/log.jsonl       a line a step
    DIR/model/          the trained model, bfloat16, as `from_pretrained` and `deltalens analyze` take it
    DIR/master/         the same in float32, where `save_master` asks for it
    DIR/adapter/        the PEFT adapter, where one was trained (`model/` then has it merged)
    DIR/steps/step-N/   bfloat16 snapshots, where `snapshot_every` asks for them
    DIR/checkpoints/    what a killed run resumes from; removed at the end

The same call goes on where an earlier one stopped, or returns at once what it made.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blake3 import blake3

from deltalens._version import __version__
from deltalens.errors import CheckpointError, ConfigError
from deltalens.files import whole_file
from deltalens.subnetwork.mask import SubnetworkMask
from deltalens.train.build import build_trainer
from deltalens.train.config import OPDRun, Run, SeqKDRun
from deltalens.train.data import data_hash
from deltalens.train.embedded import embedded_model
from deltalens.train.guard import last_checkpoint
from deltalens.train.models import bfloat16_is_emulated, load_processor, quiet_libraries, resolve_model
from deltalens.train.progress import Stages
from deltalens.train.save import save_weights
from deltalens.train.tasks import get_task
from deltalens.train.watch import OnStep, Stop, interruptible, log_rows, watcher, write_log

__all__ = ["RunResult", "model_hash", "train"]

# Where model and teachers lie does not matter, their hashes are compared; the others change nothing of the result.
_FREE = {"model", "mask", "teacher", "teachers", "save_master", "checkpoint_every", "geometry_every", "report_to"}
_DEFAULTS: dict[str, Any] = {name: field.default for name, field in Run.model_fields.items() if not field.is_required()}


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What `train` made; `log` has a dict a step (`step`, `loss`, `grad_norm`, `learning_rate`, …)."""

    folder: Path
    source: Path
    model: Path
    log: list[dict[str, float]]


def train(
    run: Any, output: str | Path, *, fresh: bool = False, quiet: bool = False, on_step: OnStep | None = None
) -> RunResult:
    """Train a model as a config says.

    Args:
        run: from `load_config`.
        output: the run's folder.
        fresh: start over instead of going on after what an earlier call did.
        quiet: no progress.
        on_step: called after each step with the step, the number of steps and the loss.

    Raises:
        ConfigError: the task, model or teacher is not there, tokenizers do not fit, or `output` holds another run.
        DeltalensError: a loss became NaN or infinite.
        KeyboardInterrupt: stopped by Ctrl-C, after the step under way was saved.
    """
    folder = Path(output)
    with quiet_libraries(), Stages(quiet=quiet) as stages:
        from accelerate import PartialState

        main = PartialState().is_main_process
        task = get_task(run.task)
        examples = task.train(run.steps * run.prompts_per_step, run.seed)
        with stages.stage("model") as update:
            update(0, run.model)
            source = embedded_model() if run.model == "embedded" else resolve_model(run.model)
            teachers = {name: str(resolve_model(path)) for name, path in _teachers(run).items()}
            manifest = _manifest(run, source, teachers, data_hash(examples))
            update(1, str(source))
        if fresh and main:
            shutil.rmtree(folder, ignore_errors=True)
        PartialState().wait_for_everyone()
        done = _open(folder, manifest, write=main)
        if done:
            return _result(folder, source)
        started = time.monotonic()
        if run.bf16 and bfloat16_is_emulated():
            teacher = " and `teacher_dtype: float32`" if hasattr(run, "teacher_dtype") else ""
            stages.say(f"no bfloat16 instructions here: `bf16: false`{teacher} trains several times faster")
        stop = Stop()
        processor = load_processor(source)
        trainer = build_trainer(run, source, teachers, task, examples, processor, folder, stages)

        def snapshot(step: int) -> None:
            save_weights(trainer, processor, folder / "steps" / f"step-{step}", "bfloat16")

        with stages.stage("training", total=run.steps) as update:

            def step_done(step: int, steps: int, loss: float) -> None:
                update(step, f"loss {loss:.4g}")
                if on_step is not None:
                    on_step(step, steps, loss)

            trainer.add_callback(
                watcher(
                    log=folder / "log.jsonl",
                    stop=stop,
                    on_step=step_done,
                    snapshot_every=run.snapshot_every,
                    snapshot=snapshot,
                )
            )
            with interruptible(stop):
                trainer.train(resume_from_checkpoint=last_checkpoint(folder / "checkpoints"))
            if stop.asked and trainer.state.global_step < run.steps:
                raise KeyboardInterrupt
        with stages.stage("saving"):
            adapter = folder / "adapter" if run.lora is not None else None
            save_weights(trainer, processor, folder / "model", "bfloat16", adapter=adapter)
            if run.save_master:
                save_weights(trainer, processor, folder / "master", "float32")
            if main:
                write_log(folder / "log.jsonl", trainer.state.log_history)
                seconds = round(time.monotonic() - started, 1)  # of this call: a resumed run's last part
                _write(folder, {**manifest, "finished": True, "seconds": seconds})
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return RunResult(folder=folder, source=source, model=folder / "model", log=log_rows(trainer.state.log_history))


def _teachers(run: Any) -> dict[str, str]:
    """The local teachers of a run by name; a single one has the name ``""``."""
    if isinstance(run, OPDRun) and run.teachers is not None:
        return dict(run.teachers)
    if isinstance(run, (OPDRun, SeqKDRun)) and isinstance(run.teacher, str):
        return {"": run.teacher}
    return {}


def _manifest(run: Any, source: Path, teachers: dict[str, str], data: str) -> dict[str, Any]:
    packages = ("torch", "transformers", "trl", "accelerate", "datasets")
    return {
        "schema": 1,
        "config": run.model_dump(mode="json", exclude={"output"}),
        "data_blake3": data,
        "model_blake3": model_hash(source),
        "mask_blake3": None if run.mask is None else _mask_hash(run.mask),
        "teachers_blake3": {name: model_hash(Path(path)) for name, path in teachers.items()},
        "versions": {
            "deltalens": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }


def model_hash(folder: Path) -> str:
    """BLAKE3 over the names and bytes of the files that decide what a model does, in order of name."""
    hasher = blake3(max_threads=blake3.AUTO)
    for file in sorted(file for pattern in ("*.safetensors", "*.json", "*.jinja") for file in folder.glob(pattern)):
        hasher.update(file.name.encode())
        hasher.update_mmap(file)
    return hasher.hexdigest()


def _mask_hash(path: str) -> str:
    try:
        return SubnetworkMask.load(path).content_hash()
    except CheckpointError as error:
        why = str(error).removeprefix(f"{path}: ")
        raise ConfigError(f"mask {path}: cannot be read ({why}); make one with `deltalens mask`") from None


def _open(folder: Path, manifest: dict[str, Any], *, write: bool) -> bool:
    """Whether the folder holds this run, finished. A new one gets its manifest.

    Raises:
        ConfigError: it holds another run, or one that cannot be read.
    """
    file = folder / "manifest.json"
    if not file.exists():
        if write:
            _write(folder, manifest)
        return False
    try:
        earlier = json.loads(file.read_text())
        config = earlier["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{file}: cannot be read; use --fresh to start over, or another folder") from None
    # A key that an older version did not have stood at its default.
    earlier_config = _DEFAULTS | config
    changed = [k for k in manifest["config"] if earlier_config.get(k) != manifest["config"][k] and k not in _FREE]
    had, wanted = earlier_config["snapshot_every"], manifest["config"]["snapshot_every"]
    if "snapshot_every" in changed and (wanted is None or (had is not None and wanted % had == 0)):
        changed.remove("snapshot_every")  # more snapshots than are asked for change nothing
    changed += [
        k for k in ("data_blake3", "model_blake3", "mask_blake3", "teachers_blake3") if earlier.get(k) != manifest[k]
    ]
    if changed:
        raise ConfigError(
            f"{folder}: holds a run with another {', '.join(changed)}; use --fresh to start over, or another folder"
        )
    asked = ["model"] + ["master"] * manifest["config"]["save_master"]
    return bool(earlier.get("finished")) and all((folder / name / "config.json").is_file() for name in asked)


def _write(folder: Path, manifest: dict[str, Any]) -> None:
    with whole_file(folder / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")


def _result(folder: Path, source: Path) -> RunResult:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return RunResult(folder=folder, source=source, model=folder / "model", log=[json.loads(line) for line in lines])
