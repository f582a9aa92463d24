"""`analyze`: two checkpoints in, tables and a summary out."""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deltalens._version import __version__
from deltalens.analysis.cache import SourceCache
from deltalens.analysis.engine import Progress, measure_all
from deltalens.analysis.journal import Journal
from deltalens.analysis.pair import Measured
from deltalens.analysis.result import AnalysisResult
from deltalens.analysis.settings import Settings
from deltalens.analysis.summary import summary_tables
from deltalens.checkpoint import Checkpoint, open_checkpoint
from deltalens.checkpoint.base import FLOAT_DTYPES
from deltalens.checkpoint.formats.peft import LoraSource
from deltalens.checkpoint.pairing import Pairing, pair_checkpoints
from deltalens.errors import CheckpointError, DeltalensError

__all__ = ["analyze", "checkpoint_files", "checkpoint_side", "run_warnings", "writing"]

SCHEMA = 1
ENGINES = ("local", "ray")
FAR = 0.2  # relative norm beyond which SOURCE is probably not what TRAINED was trained from


def analyze(
    source: str | Path,
    trained: str | Path,
    *,
    output: str | Path | None = None,
    settings: Settings | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    master: str | Path | None = None,
    cache: str | Path | None = None,
    jobs: int | None = None,
    engine: str = "local",
    resume: bool = True,
    progress: Progress | None = None,
) -> AnalysisResult:
    """Measure what training did to a model's weights.

    Args:
        source, trained: a directory, a file, or a Hub id with an optional `@revision`.
        output: write the tables, the summary and the report there; a run cut short is then taken up again.
        settings: what to compute; `Settings()` by default.
        include, exclude: shell patterns on tensor names.
        master: float32 weights of `trained` before they were rounded; adds the coverages that rounding did not touch.
        cache: keep the source's factorisations and principal masks in this folder, and take them from it.
        jobs: threads, one a processor by default; tensors at a time on Ray.
        engine: `local`, or `ray` for a task a tensor on a Ray cluster, with the same rows.
        resume: take up an earlier, unfinished run of the same comparison in `output`.
        progress: called with bytes done, bytes in all, and the tensor just finished.

    Raises:
        CheckpointError: a checkpoint cannot be read, or the two cannot be compared.
        DeltalensError: `output` or `cache` cannot be written, or the device or engine cannot be used.
    """
    settings = settings or Settings()
    if engine not in ENGINES:
        raise DeltalensError(f"engine {engine!r}: choose one of {', '.join(ENGINES)}")
    if settings.device != "cpu" and engine == "local":
        from deltalens.accelerator import check_device

        check_device(settings.device)
    with ExitStack() as opened:
        before = opened.enter_context(open_checkpoint(source))
        after = opened.enter_context(open_checkpoint(trained, base=before))
        full = opened.enter_context(open_checkpoint(master)) if master is not None else None
        if settings.compare_dtype is None:
            lora = isinstance(after.tensors, LoraSource)
            settings = replace(settings, compare_dtype="stored" if lora else "bf16")
        pairing = pair_checkpoints(before, after, include=include, exclude=exclude)
        said = _check_master(full, after, pairing) if full is not None else []
        if cache is not None:
            with writing(cache, "--cache"):
                Path(cache).mkdir(parents=True, exist_ok=True)
        journal = None
        if output is not None:
            with writing(output, "-o"):
                journal = Journal(Path(output), _identity(before, after, full, pairing, settings), resume=resume)
        # What the end needs loads while the workers count, who need little of the interpreter.
        threading.Thread(target=_load_rest, args=(output is not None,), daemon=True).start()
        try:
            shelf = SourceCache(Path(cache)) if cache is not None else None
            how: dict[str, Any] = {"jobs": jobs, "journal": journal, "progress": progress}
            if engine == "ray":
                from deltalens.analysis.ray_engine import Inputs, measure_all_on_ray

                measured = measure_all_on_ray(pairing.pairs, Inputs.of(before, after, full, shelf, settings), **how)
            else:
                measured = measure_all(pairing.pairs, before, after, settings, master=full, cache=shelf, **how)
        finally:
            if journal is not None:
                journal.close()
        summary = _summary(before, after, pairing, measured, settings)
        summary["warnings"] += said
        result = AnalysisResult.of(measured, summary, _manifest(before, after, measured, settings))
    if output is not None and journal is not None:
        with writing(output, "-o"):
            result.save(output)
        journal.remove()
    return result


def _load_rest(page: bool) -> None:
    with suppress(Exception):  # it is said where it is needed
        import_module("polars")
        if page:
            import_module("deltalens.report.html").load_page()


@contextmanager
def writing(folder: str | Path, option: str) -> Iterator[None]:
    """Turns the system's refusal to write into an error that says what to do."""
    try:
        yield
    except OSError as error:
        message = f"{folder}: cannot be written ({error.strerror}); choose another folder with {option}"
        raise DeltalensError(message) from None


def _check_master(master: Checkpoint, trained: Checkpoint, pairing: Pairing) -> list[str]:
    """Warnings about what the master weights lack.

    Raises:
        CheckpointError: they hold none of the tensors, or one of another shape or of no floating-point dtype.
    """
    missing, found = [], 0
    for pair in pairing.pairs:
        name = next((n for n in (pair.trained_name, pair.source_name) if n in master.entries), None)
        if name is None:
            missing.append(pair.name)
            continue
        entry, shape = master.entries[name], trained.entries[pair.trained_name].shape
        if entry.shape != shape or entry.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} is {entry.dtype} {list(entry.shape)}, in {trained.path} a weight of "
                f"{list(shape)}; --master wants the same model's weights before they were rounded"
            )
        found += 1
    if not found:
        raise CheckpointError(
            f"{master.path}: holds none of the tensors of {trained.path}; --master wants the same model's weights "
            "before they were rounded"
        )
    return [f"{len(missing)} tensors are not in --master: {', '.join(missing[:5])}"] if missing else []


def checkpoint_files(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Path, size and modification time of each file, for manifests and to tell a journal whose rows it holds."""
    out = []
    for file in checkpoint.files:
        stat = file.stat()
        out.append({"path": str(file), "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns})
    return out


def _identity(
    source: Checkpoint, trained: Checkpoint, master: Checkpoint | None, pairing: Pairing, settings: Settings
) -> dict[str, Any]:
    sides = [checkpoint_files(side) for side in (source, trained, master) if side is not None]
    names = [pair.name for pair in pairing.pairs]
    return {"version": __version__, "files": sides, "tensors": names, "settings": settings.as_dict()}


def _summary(
    source: Checkpoint, trained: Checkpoint, pairing: Pairing, measured: Sequence[Measured], settings: Settings
) -> dict[str, Any]:
    rows = [m.row for m in measured]
    return {
        "schema": SCHEMA,
        "deltalens": __version__,
        "source": checkpoint_side(source),
        "trained": checkpoint_side(trained),
        "settings": settings.as_dict(),
        **summary_tables(rows, settings),
        "skipped": [{"tensor": s.tensor, "reason": s.reason} for s in pairing.skipped],
        "warnings": [*pairing.warnings, *run_warnings(pairing, rows, settings)],
    }


def checkpoint_side(checkpoint: Checkpoint) -> dict[str, Any]:
    """What summary.json says of one side."""
    return {
        "path": checkpoint.path,
        "format": checkpoint.format,
        "files": len(checkpoint.files),
        "bytes": checkpoint.nbytes,
        "parameters": checkpoint.parameters,
    }


def run_warnings(pairing: Pairing, rows: Sequence[dict[str, Any]], settings: Settings) -> list[str]:
    """What the user must hear about the pairs compared and their rows."""
    out = []
    if settings.compare_dtype == "bf16":
        finer = {"F32", "F64", "F16"}
        count = sum(pair.source_dtype in finer and pair.trained_dtype in finer for pair in pairing.pairs)
        if count:
            out.append(
                f"{count} tensors are stored finer than bf16 on both sides: the sparsity comes from the cast to bf16; "
                "--compare-dtype stored compares them as saved"
            )
    bad = [row["name"] for row in rows if row["nonfinite_count"]]
    if bad:
        out.append(f"NaN or Inf in {len(bad)} tensors, left out of every aggregate: {', '.join(bad[:5])}")
    norms = [row["relative_norm"] for row in rows if row.get("relative_norm") is not None]
    if norms and 2 * sum(norm > FAR for norm in norms) > len(norms):
        out.append(
            f"most tensors differ by more than {FAR:.0%} of their norm: SOURCE is probably not what TRAINED was "
            "trained from"
        )
    return out


def _manifest(
    source: Checkpoint, trained: Checkpoint, measured: Sequence[Measured], settings: Settings
) -> dict[str, Any]:
    hashes = {m.row["name"]: [m.source_hash, m.trained_hash] for m in measured if m.source_hash is not None}
    return {
        "schema": SCHEMA,
        "source": {"path": source.path, "files": checkpoint_files(source)},
        "trained": {"path": trained.path, "files": checkpoint_files(trained)},
        "blake3": hashes,
        "settings": settings.as_dict(),
        "versions": {
            "deltalens": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "numba", "polars", "scipy")},
        },
    }
