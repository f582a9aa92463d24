"""`compare`: several runs of one source in, what their updates share out, beside chance and rounding."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import numpy as np
import polars as pl
from threadpoolctl import threadpool_limits

from deltalens._version import __version__
from deltalens.analysis.analyze import FAR, writing
from deltalens.analysis.compare_summary import pair_rows, pooled_rows, tensor_rows
from deltalens.analysis.engine import Progress, run_all
from deltalens.analysis.journal import Journal
from deltalens.analysis.null_draws import draw_update
from deltalens.analysis.pair import Buffers, Measured
from deltalens.analysis.runs import RunSet, RunTensor, open_runs
from deltalens.analysis.settings import Settings
from deltalens.errors import CheckpointError, ConfigError
from deltalens.files import whole_file
from deltalens.metrics.overlap import (
    RunCounts,
    Subspaces,
    histogram_energy,
    leading_subspaces,
    measure_overlap,
    subspace_similarities,
)
from deltalens.metrics.overlap_null import expected_intersections, expected_moments
from deltalens.metrics.rounding_null import RoundingNull, fine_histogram, fit_all
from deltalens.metrics.values import Compare, round_threshold

__all__ = ["CompareResult", "compare"]

SCHEMA = 1
NULL_DRAWS = 3


@dataclass(frozen=True, slots=True, repr=False)
class CompareResult:
    """What `compare` found.

    Attributes:
        pairs: a row for each pair of runs and each scope (`global`, `core`, `role`, `layer`, `module`) and key.
        tensors: a row for each pair of runs and each tensor.
        summary: the content of summary.json.
        manifest: what was read, versions, settings, and the seconds spent.
    """

    pairs: pl.DataFrame
    tensors: pl.DataFrame
    summary: dict[str, Any]
    manifest: dict[str, Any]

    def save(self, folder: str | Path) -> Path:
        """Write pairs.parquet, tensors.parquet, summary.json, manifest.json and report.html; returns the folder."""
        output = Path(folder)
        for name, table in (("pairs.parquet", self.pairs), ("tensors.parquet", self.tensors)):
            with whole_file(output / name) as file:
                table.write_parquet(file)
        for name, value in (("summary.json", self.summary), ("manifest.json", self.manifest)):
            with whole_file(output / name) as file:
                file.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
        self.to_html(output / "report.html")
        return output

    def to_html(self, path: str | Path) -> Path:
        """Write the self-contained page; returns its path."""
        from deltalens.report.compare import render_compare_html

        with whole_file(Path(path)) as file:
            file.write_text(render_compare_html(self.pairs, self.tensors, self.summary), encoding="utf-8")
        return Path(path)

    def __repr__(self) -> str:
        from deltalens.report.compare import compare_repr

        return compare_repr(self.summary)


def compare(
    source: str | Path,
    runs: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    threshold: float = 1e-5,
    compare_dtype: Compare | None = None,
    null_draws: int = NULL_DRAWS,
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    jobs: int | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> CompareResult:
    """Measure what the updates of several runs of one source share, pair by pair.

    Args:
        source: what every run was trained from: a directory, a file, or a Hub id with an optional `@revision`.
        runs: two runs or more.
        output: write the tables, the summary and the page there; a comparison cut short is then taken up again.
        threshold: τ; an update is visible where |Δ| > τ.
        compare_dtype: `bf16` (default) casts all sides first, `stored` (default where every run is a LoRA adapter)
            compares as saved, `fp32` in float32.
        null_draws: simulated draws a run and matrix for the rounding null of Sim_16; 0 for none.
        seed: of the draws and the bootstrap.
        include, exclude: shell patterns on tensor names.
        jobs: threads, one a processor by default.
        resume: take up an earlier, unfinished comparison of the same inputs in `output`.
        progress: called with bytes done, bytes in all, and the tensor just finished.

    Raises:
        ConfigError: fewer than two runs.
        CheckpointError: a checkpoint cannot be read, they cannot be compared, or no tensor is finite in all of them.
        DeltalensError: `output` cannot be written.
        ValueError: a setting is out of range.
    """
    settings = Settings(threshold=threshold, compare_dtype=compare_dtype, null_draws=null_draws, seed=seed)
    if len(runs) < 2:
        raise ConfigError(f"compare needs two runs or more, not {len(runs)}; for one run use analyze")
    with open_runs(source, runs, include=include, exclude=exclude) as opened:
        if settings.compare_dtype is None:
            settings = replace(settings, compare_dtype="stored" if opened.all_lora else "bf16")
        chosen = {key: settings.as_dict()[key] for key in ("threshold", "compare_dtype", "null_draws", "seed")}
        identity = {
            "command": "compare",
            "version": __version__,
            "files": opened.files(),
            "tensors": [tensor.name for tensor in opened.tensors],
            "settings": chosen,
        }
        journal = None
        if output is not None:
            with writing(output, "-o"):
                journal = Journal(Path(output), identity, resume=resume)

        def work(tensor: RunTensor, buffers: Buffers) -> Measured:
            return Measured(measure_tensor(opened, tensor, settings, buffers))

        try:
            measured = run_all(
                opened.tensors,
                work,
                gate=opened.gate(len(runs) + 2),  # the source, the runs, and a draw
                jobs=jobs,
                journal=journal,
                progress=progress,
            )
        finally:
            if journal is not None:
                journal.close()
        with threadpool_limits(1):  # the products of the bootstrap are too small to share
            result = _result(opened, [m.row for m in measured], chosen, settings)
    if output is not None and journal is not None:
        with writing(output, "-o"):
            result.save(output)
        journal.remove()
    return result


def measure_tensor(runs: RunSet, tensor: RunTensor, settings: Settings, buffers: Buffers) -> dict[str, Any]:
    """One tensor of all runs in, one row of plain numbers out: lists over runs, and over pairs of runs."""
    start = time.perf_counter()
    before, after, fine = runs.read(tensor, settings.compare, buffers)
    first = tensor.first
    thresholds = [
        round_threshold(settings.threshold, settings.compare, _finer(first.source_dtype, pair.trained_dtype))
        for pair in tensor.pairs
    ]
    histogram, counts, joint, nonfinite = measure_overlap(before, after, thresholds)
    row: dict[str, Any] = {
        "name": tensor.name,
        "layer": first.layer,
        "role": first.role,
        "module": first.module,
        "shape": "x".join(map(str, tensor.shape)),
        "parameters": tensor.count,
        "nonfinite_count": nonfinite,
        "seconds": 0.0,
        "draw_seconds": 0.0,
    }
    if nonfinite:
        return row
    cells = None if fine is None else fine_histogram(fine)
    grids = [_grid(pair.trained_dtype, settings.compare) for pair in tensor.pairs]
    visible = [(c.visible, tau, grid) for c, tau, grid in zip(counts, thresholds, grids, strict=True)]
    nonzero = [(c.nonzero, 0.0, grid) for c, grid in zip(counts, grids, strict=True)]
    words = np.flatnonzero(histogram)
    nulls = fit_all(words, histogram[words], [*visible, *nonzero], cells)
    visible_nulls, nonzero_nulls = nulls[: len(counts)], nulls[len(counts) :]
    row |= {
        "visible": [c.visible for c in counts],
        "nonzero": [c.nonzero for c in counts],
        "delta_energy": [c.energy for c in counts],
        "source_energy": histogram_energy(histogram),
        "scale": [None if null is None else null.scale for null in nonzero_nulls],
    }
    on_bf16 = [
        null if cells is None and grid == "bf16" else None for null, grid in zip(visible_nulls, grids, strict=True)
    ]
    found = [
        {
            "visible": one.visible,
            "visible_same": one.visible_same,
            "nonzero": one.nonzero,
            "nonzero_same": one.nonzero_same,
            "dot": one.dot,
            "moments": list(one.moments),
            "expected": expected,
            "expected_nonzero": expected_nonzero,
            "expected_moments": moments,
        }
        for one, expected, expected_nonzero, moments in zip(
            joint,
            expected_intersections(histogram, visible_nulls),
            expected_intersections(histogram, nonzero_nulls),
            expected_moments(histogram, on_bf16, thresholds),
            strict=True,
        )
    ]
    row["pairs"] = found
    if first.is_matrix:
        similarities = _similarities(_spaces(before, after, tensor.shape, counts))
        for one_pair, ours, theirs in zip(found, *similarities, strict=True):
            one_pair |= {"sim_left": ours[0], "sim_right": theirs[0], "sim_rank": theirs[1]}
    row["seconds"] = time.perf_counter() - start
    if first.is_matrix and settings.null_draws and before.dtype == np.uint16:
        start = time.perf_counter()
        _add_draws(row, before.reshape(tensor.shape), nonzero_nulls, settings)
        row["draw_seconds"] = time.perf_counter() - start
    return row


def _finer(source_dtype: str, trained_dtype: str) -> str:
    return "F64" if "F64" in (source_dtype, trained_dtype) else source_dtype


def _grid(trained_dtype: str, compare: Compare) -> Literal["bf16", "fp16", "fp32"]:
    """The grid on which a run's weights were stored, as far as the comparison sees it."""
    if compare == "stored":
        return {"BF16": "bf16", "F16": "fp16"}.get(trained_dtype, "fp32")  # type: ignore[return-value]
    return "bf16" if compare == "bf16" else "fp32"


def _spaces(
    before: np.ndarray, after: Sequence[np.ndarray], shape: tuple[int, ...], counts: Sequence[RunCounts]
) -> list[Subspaces | None]:
    return [
        leading_subspaces(before.reshape(shape), run.reshape(shape)) if c.energy > 0 else None
        for run, c in zip(after, counts, strict=True)
    ]


def _similarities(
    spaces: Sequence[Subspaces | None],
) -> tuple[list[tuple[float | None, int]], list[tuple[float | None, int]]]:
    """(Sim, K) of the left and of the right subspaces of every pair."""
    left = subspace_similarities([None if one is None else one.left for one in spaces])
    return left, subspace_similarities([None if one is None else one.right for one in spaces])


def _add_draws(
    row: dict[str, Any], words: np.ndarray, nulls: Sequence[RoundingNull | None], settings: Settings
) -> None:
    """Sim of independent draws bf16(W + s·N) − W, one a run and draw, in `sim_left_draws` and `sim_right_draws`."""
    for pair in row["pairs"]:
        pair |= {"sim_left_draws": [], "sim_right_draws": []}
    for draw in range(settings.null_draws):
        spaces: list[Subspaces | None] = []
        for run, null in enumerate(nulls):
            if null is None:
                spaces.append(None)
                continue
            # By name too: two tensors of one shape must not share their noise.
            rng = np.random.default_rng([settings.seed, draw, run, crc32(row["name"].encode())])
            spaces.append(leading_subspaces(words, draw_update(words, null.scale, rng)))
        for pair, ours, theirs in zip(row["pairs"], *_similarities(spaces), strict=True):
            if ours[0] is not None:
                pair["sim_left_draws"].append(ours[0])
                pair["sim_right_draws"].append(theirs[0])


def _result(runs: RunSet, rows: list[dict[str, Any]], chosen: dict[str, Any], settings: Settings) -> CompareResult:
    finite = [row for row in rows if not row["nonfinite_count"]]
    if not finite:
        raise CheckpointError(
            f"nothing to compare: NaN or Inf in each of the {len(rows)} tensors, among them {rows[0]['name']}; "
            f"`deltalens analyze {runs.source.path} RUN` says of each run which of its tensors are finite"
        )
    pooled = pooled_rows(finite, runs.names, settings.seed)
    count = sum(row["parameters"] for row in finite)
    warnings = list(runs.warnings)
    if bad := [row["name"] for row in rows if row["nonfinite_count"]]:
        warnings.append(f"NaN or Inf in {len(bad)} tensors, left out: {', '.join(bad[:5])}")
    for i, name in enumerate(runs.names):
        moved = [row["delta_energy"][i] > FAR**2 * row["source_energy"] for row in finite]
        if 2 * sum(moved) > len(moved):
            warnings.append(
                f"{name}: most tensors differ by more than {FAR:.0%} of their norm; it was probably not trained from "
                "SOURCE"
            )
    finer = {"F32", "F64", "F16"}
    cast = sum(t.first.source_dtype in finer and all(p.trained_dtype in finer for p in t.pairs) for t in runs.tensors)
    if settings.compare == "bf16" and cast:
        warnings.append(
            f"{cast} tensors are stored finer than bf16 on all sides: what is visible comes from the cast to bf16; "
            "--compare-dtype stored compares them as saved"
        )
    summary = {
        "schema": SCHEMA,
        "deltalens": __version__,
        "source": {"path": runs.source.path, "format": runs.source.format, "parameters": runs.source.parameters},
        "runs": [
            {
                "name": name,
                "path": run.path,
                "density": sum(row["visible"][i] for row in finite) / count if count else None,
                "density_nonzero": sum(row["nonzero"][i] for row in finite) / count if count else None,
            }
            for i, (name, run) in enumerate(zip(runs.names, runs.runs, strict=True))
        ],
        "settings": chosen,
        "tensors": len(rows),
        "parameters": sum(row["parameters"] for row in rows),
        "pairs": pair_rows(pooled),
        "skipped": [{"tensor": s.tensor, "reason": s.reason} for s in runs.skipped],
        "warnings": warnings,
    }
    manifest = {
        "schema": SCHEMA,
        "files": runs.files(),
        "settings": chosen,
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
    return CompareResult(pl.DataFrame(pooled), pl.DataFrame(tensor_rows(finite, runs.names)), summary, manifest)
