"""`trajectory`: the checkpoints of one run in, every metric at each of them and what ties them together out."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl

from deltalens._version import __version__
from deltalens.analysis.analyze import checkpoint_side, run_warnings, writing
from deltalens.analysis.engine import Gate, Progress, run_all
from deltalens.analysis.follow import follow
from deltalens.analysis.journal import Journal
from deltalens.analysis.memory import held_bytes, room_for
from deltalens.analysis.pair import Buffers, Measured
from deltalens.analysis.result import table_of
from deltalens.analysis.runs import RunSet, RunTensor, open_runs
from deltalens.analysis.settings import Settings
from deltalens.analysis.trajectory_summary import checkpoint_tables, locks
from deltalens.checkpoint.pairing import Pairing
from deltalens.errors import ConfigError
from deltalens.files import whole_file

__all__ = ["TrajectoryResult", "run_steps", "trajectory"]

SCHEMA = 1
NULL_DRAWS = 3


@dataclass(frozen=True, slots=True, repr=False)
class TrajectoryResult:
    """What `trajectory` found.

    Attributes:
        table: `checkpoint`, `step`, `scope` (`global`, `role`, `layer`, `module`, `tensor`), `key`, then the metrics.
        summary: the content of summary.json.
        manifest: what was read, versions, settings, and the seconds spent.
    """

    table: pl.DataFrame
    summary: dict[str, Any]
    manifest: dict[str, Any]

    def save(self, folder: str | Path) -> Path:
        """Write trajectory.parquet, summary.json, manifest.json and report.html; returns the folder."""
        output = Path(folder)
        with whole_file(output / "trajectory.parquet") as file:
            self.table.write_parquet(file)
        for name, value in (("summary.json", self.summary), ("manifest.json", self.manifest)):
            with whole_file(output / name) as file:
                file.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
        self.to_html(output / "report.html")
        return output

    def to_html(self, path: str | Path) -> Path:
        """Write the self-contained page; returns its path."""
        from deltalens.report.trajectory import render_trajectory_html

        with whole_file(Path(path)) as file:
            file.write_text(render_trajectory_html(self.table, self.summary), encoding="utf-8")
        return Path(path)

    def __repr__(self) -> str:
        from deltalens.report.trajectory import trajectory_repr

        return trajectory_repr(self.summary)


def trajectory(
    source: str | Path,
    checkpoints: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    settings: Settings | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    jobs: int | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> TrajectoryResult:
    """Measure the checkpoints of one run against their source, and against the run's end and start.

    Args:
        source: what the run was trained from: a directory, a file, or a Hub id with an optional `@revision`.
        checkpoints: two or more of the run. They are put in the order of their steps where each has one of its own
            (`run_steps`); otherwise the order given is the run's.
        output: write the table, the summary and the page there; a run cut short is then taken up again.
        settings: what to compute; by default `Settings(null_draws=3)`. On the processor only, without permutations.
        include, exclude: shell patterns on tensor names.
        jobs: threads, one a processor by default.
        resume: take up an earlier, unfinished run of the same inputs in `output`.
        progress: called with bytes done, bytes in all, and the tensor just finished.

    Raises:
        ConfigError: fewer than two checkpoints, or a setting that a trajectory does not have.
        CheckpointError: a checkpoint cannot be read, or they cannot be compared.
        DeltalensError: `output` cannot be written.
    """
    settings = settings or Settings(null_draws=NULL_DRAWS)
    if len(checkpoints) < 2:
        raise ConfigError(f"a trajectory needs two checkpoints or more, not {len(checkpoints)}; for one use analyze")
    if settings.device != "cpu" or settings.permutations:
        raise ConfigError("a trajectory is measured on the processor and without permutations; analyze has both")
    steps, origin = run_steps(checkpoints)
    order = sorted(range(len(checkpoints)), key=lambda i: steps[i])
    steps = [steps[i] for i in order]
    with open_runs(source, [checkpoints[i] for i in order], include=include, exclude=exclude) as opened:
        if settings.compare_dtype is None:
            settings = replace(settings, compare_dtype="stored" if opened.all_lora else "bf16")
        identity = {
            "command": "trajectory",
            "version": __version__,
            "files": opened.files(),
            "tensors": [tensor.name for tensor in opened.tensors],
            "settings": settings.as_dict(),
        }
        journal = None
        if output is not None:
            with writing(output, "-o"):
                journal = Journal(Path(output), identity, resume=resume)
        chosen = settings

        def work(tensor: RunTensor, buffers: Buffers) -> Measured:
            return follow(tensor, opened.source, opened.runs, chosen, buffers)

        def held(tensor: RunTensor) -> int:
            return max(held_bytes(pair, chosen) for pair in tensor.pairs)

        room = room_for((pair for tensor in opened.tensors for pair in tensor.pairs), settings)
        try:
            measured = run_all(
                opened.tensors,
                work,
                gate=Gate(room, held),
                jobs=jobs,
                journal=journal,
                progress=progress,
            )
        finally:
            if journal is not None:
                journal.close()
        result = _result(opened, [m.row for m in measured], settings, steps, origin)
    if output is not None and journal is not None:
        with writing(output, "-o"):
            result.save(output)
        journal.remove()
    return result


_NAMED = re.compile(r"(?:checkpoint|ckpt|global_?step|step|iter)s?[-_=]?(\d+)", re.IGNORECASE)
_TRAILING = re.compile(r"(?:^|[-_=])(\d+)$")


def run_steps(checkpoints: Sequence[str | Path]) -> tuple[list[int], str]:
    """The step of each checkpoint, and where they are from: `trainer_state.json`, `name`, or `position`.

    A checkpoint's step is `global_step` of its trainer_state.json, else the number in its name (`checkpoint-40`,
    `step_40`, `run-40`; of a file or a part such as `actor`, the folder's). Where one has none, or two are alike, all
    are numbered from 1 in the order given.
    """
    found, states = [], 0
    for checkpoint in checkpoints:
        step = _trainer_state(Path(checkpoint).expanduser())
        states += step is not None
        found.append(_named_step(str(checkpoint)) if step is None else step)
    known = [step for step in found if step is not None]
    if len(known) < len(found) or len(set(known)) < len(known):
        return list(range(1, len(found) + 1)), "position"
    return known, "trainer_state.json" if states == len(found) else "name"


def _trainer_state(path: Path) -> int | None:
    try:
        state = json.loads(((path if path.is_dir() else path.parent) / "trainer_state.json").read_text())
        return int(state["global_step"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _named_step(checkpoint: str) -> int | None:
    parts = [part for part in re.split(r"[/\\]", checkpoint) if part not in ("", ".")][::-1]
    for at, part in enumerate(parts[:2]):
        named = _NAMED.search(part) or (_TRAILING.search(part) if at == 0 else None)
        if named:
            return int(named.group(1))
    return None


def _result(
    runs: RunSet, rows: Sequence[dict[str, Any]], settings: Settings, steps: Sequence[int], origin: str
) -> TrajectoryResult:
    table: list[dict[str, Any]] = []
    listed = []
    warnings = list(runs.warnings)
    for i, (name, run, step) in enumerate(zip(runs.names, runs.runs, steps, strict=True)):
        here = [row["rows"][i] for row in rows]
        span = step - steps[i - 1] if i else step
        found, part = checkpoint_tables(here, settings, max(span, 1))
        table += [{"checkpoint": name, "step": step} | row for row in found]
        listed.append({"name": name, "step": step, **checkpoint_side(run), **part})
        pairing = Pairing([tensor.pairs[i] for tensor in runs.tensors], [], [])
        warnings += [f"{name}: {text}" for text in run_warnings(pairing, here, settings)]
    if origin == "position":
        warnings.append(
            "the checkpoints' steps are not all known and different: they are numbered in the order given (a step "
            "comes from trainer_state.json or a number in the folder's name)"
        )
    summary = {
        "schema": SCHEMA,
        "deltalens": __version__,
        "source": checkpoint_side(runs.source),
        "settings": settings.as_dict(),
        "steps_from": origin,
        **locks(listed),
        "checkpoints": listed,
        "tensors": len(rows),
        "parameters": sum(tensor.count for tensor in runs.tensors),
        "skipped": [{"tensor": s.tensor, "reason": s.reason} for s in runs.skipped],
        "warnings": warnings,
    }
    manifest = {
        "schema": SCHEMA,
        "files": runs.files(),
        "settings": settings.as_dict(),
        "seconds": {  # summed over threads; the draws apart from everything else
            "measure": sum(row["seconds"] for row in rows),
            "null_draws": sum(row["draw_seconds"] for row in rows),
        },
        "versions": {
            "deltalens": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "numba", "polars", "scipy")},
        },
    }
    return TrajectoryResult(table_of(table), summary, manifest)
