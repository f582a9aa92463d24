"""`analyze`: two checkpoints in, tables and a summary out."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deltalens._version import __version__
from deltalens.analysis.cache import FactorisationCache
from deltalens.analysis.engine import Progress, measure_all
from deltalens.analysis.journal import Journal
from deltalens.analysis.pair import Measured
from deltalens.analysis.result import AnalysisResult
from deltalens.analysis.settings import Settings
from deltalens.analysis.summary import summary_tables
from deltalens.checkpoint import Checkpoint, open_checkpoint
from deltalens.checkpoint.formats.peft import LoraSource
from deltalens.checkpoint.pairing import Pairing, pair_checkpoints
from deltalens.errors import DeltalensError

__all__ = ["analyze"]

SCHEMA = 1
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
        cache: keep the source's factorisations in this folder, and take them from it (about 1.1 × the source's bytes).
        jobs: threads, one a processor by default.
        resume: take up an earlier, unfinished run of the same comparison in `output`.
        progress: called with bytes done, bytes in all, and the tensor just finished.

    Raises:
        CheckpointError: a checkpoint cannot be read, or the two cannot be compared.
        DeltalensError: `output` cannot be written.
    """
    settings = settings or Settings()
    with open_checkpoint(source) as before, open_checkpoint(trained, base=before) as after:
        if settings.compare_dtype is None:
            lora = isinstance(after.tensors, LoraSource)
            settings = replace(settings, compare_dtype="stored" if lora else "bf16")
        pairing = pair_checkpoints(before, after, include=include, exclude=exclude)
        full = open_checkpoint(master) if master is not None else None
        journal = None
        if output is not None:
            journal = _journal(Path(output), _identity(before, after, full, pairing, settings), resume)
        try:
            measured = measure_all(
                pairing.pairs,
                before,
                after,
                settings,
                master=full,
                jobs=jobs,
                journal=journal,
                cache=FactorisationCache(Path(cache)) if cache is not None else None,
                progress=progress,
            )
        except BaseException:
            if journal is not None:
                journal.close()
            raise
        finally:
            if full is not None:
                full.tensors.close()
        summary = _summary(before, after, pairing, measured, settings)
        result = AnalysisResult.of(measured, summary, _manifest(before, after, measured, settings))
    if output is not None and journal is not None:
        result.save(output)
        journal.remove()
    return result


def _journal(output: Path, identity: dict[str, Any], resume: bool) -> Journal:
    try:
        return Journal(output, identity, resume=resume)
    except OSError as error:
        raise DeltalensError(f"{output}: cannot be written ({error.strerror}); choose another folder with -o") from None


def _files(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    out = []
    for file in checkpoint.files:
        stat = file.stat()
        out.append({"path": str(file), "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns})
    return out


def _identity(
    source: Checkpoint, trained: Checkpoint, master: Checkpoint | None, pairing: Pairing, settings: Settings
) -> dict[str, Any]:
    sides = [_files(side) for side in (source, trained, master) if side is not None]
    names = [pair.name for pair in pairing.pairs]
    return {"version": __version__, "files": sides, "tensors": names, "settings": settings.as_dict()}


def _summary(
    source: Checkpoint, trained: Checkpoint, pairing: Pairing, measured: Sequence[Measured], settings: Settings
) -> dict[str, Any]:
    rows = [m.row for m in measured]
    return {
        "schema": SCHEMA,
        "deltalens": __version__,
        "source": _side(source),
        "trained": _side(trained),
        "settings": settings.as_dict(),
        **summary_tables(rows, settings),
        "skipped": [{"tensor": s.tensor, "reason": s.reason} for s in pairing.skipped],
        "warnings": [*pairing.warnings, *_warnings(pairing, rows, settings)],
    }


def _side(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "path": checkpoint.path,
        "format": checkpoint.format,
        "files": len(checkpoint.files),
        "bytes": checkpoint.nbytes,
        "parameters": checkpoint.parameters,
    }


def _warnings(pairing: Pairing, rows: Sequence[dict[str, Any]], settings: Settings) -> list[str]:
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
        "source": {"path": source.path, "files": _files(source)},
        "trained": {"path": trained.path, "files": _files(trained)},
        "blake3": hashes,
        "settings": settings.as_dict(),
        "versions": {
            "deltalens": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "numba", "polars", "scipy")},
        },
    }
