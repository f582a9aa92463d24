"""`deltalens compare` against the sum of its parts, and its peak memory against 500 MB + 4 × the largest tensor.

    python benchmarks/bench_compare.py [SOURCE RUN RUN...] [--runs 3] [--draws 3]

Without paths it makes a source and three runs at the shapes of SmolLM2-135M. The parts, in CPU seconds of one thread:
reading every file once and the coordinate pass of each run with its nulls (what `analyze --spectrum none` does), and
the top 16 singular directions of each Δ, by the comparison's own routine and, as the named peer, by LAPACK through
`numpy.linalg.eigh` of the smaller Gram matrix (timed on every eighth matrix and scaled by the flops). All alternate
tensor by tensor; of several runs each part of each tensor counts with its least time, as other work on a machine only
ever adds. Tables and page come on top. The simulated null's draws are counted apart, in a process whose memory is
watched.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import polars as pl
from bench_analyze import synthetic_pair
from processes import command, machine, run_process
from safetensors.numpy import load_file, save_file
from threadpoolctl import threadpool_limits

from deltalens import Settings
from deltalens.analysis.compare import CompareResult, measure_tensor
from deltalens.analysis.compare_summary import pair_rows, pooled_rows, tensor_rows
from deltalens.analysis.pair import Buffers, measure_against, read_source
from deltalens.analysis.runs import RunSet, RunTensor, open_runs
from deltalens.metrics.overlap import leading_subspaces

COUNTS = Settings(compare_dtype="bf16", spectrum="none")
COMPARED = Settings(compare_dtype="bf16", null_draws=0)
PARTS = "reading and coordinate passes", "top 16 of each Δ"


def synthetic_runs(folder: Path) -> list[Path]:
    """A source and three runs; a quarter of the coordinates and more differ."""
    source, first = synthetic_pair(folder)
    paths = [source, first]
    weights = load_file(source / "model.safetensors")
    for seed, scale in ((1, 3e-5), (2, 1e-4)):
        rng = np.random.default_rng(seed)
        run = {
            name: (w.astype(np.float32) + np.float32(scale) * rng.standard_normal(w.shape, np.float32)).astype(
                ml_dtypes.bfloat16
            )
            for name, w in weights.items()
        }
        path = folder / f"run-{seed}"
        path.mkdir()
        save_file(run, path / "model.safetensors", metadata={"format": "pt"})
        paths.append(path)
    return paths


def one_tensor(opened: RunSet, tensor: RunTensor, buffers: Buffers) -> tuple[dict[str, float], dict[str, Any]]:
    """CPU seconds of each part and of the whole, and the row that the comparison made."""
    spent = {}
    start = time.thread_time()
    side = read_source(tensor.first, opened.source, COUNTS, buffers)
    for pair, run in zip(tensor.pairs, opened.runs, strict=True):
        measure_against(side, pair, run, COUNTS, buffers)
    spent[PARTS[0]] = time.thread_time() - start
    before, after, _ = opened.read(tensor, "bf16", buffers)
    start = time.thread_time()
    if tensor.first.is_matrix:
        for run in after:
            leading_subspaces(before.reshape(tensor.shape), run.reshape(tensor.shape))
    spent[PARTS[1]] = time.thread_time() - start
    start = time.thread_time()
    row = measure_tensor(opened, tensor, COMPARED, buffers)
    spent["whole"] = time.thread_time() - start
    return spent, row


def tables_seconds(rows: list[dict[str, Any]], names: Sequence[str], output: Path) -> float:
    """CPU seconds of the tables and the page from the rows of all tensors."""
    start = time.thread_time()
    pooled = pooled_rows(rows, names, 0)
    summary = {
        "source": {"path": "source"},
        "runs": [{"name": name, "path": name, "density": None, "density_nonzero": None} for name in names],
        "pairs": pair_rows(pooled),
    }
    CompareResult(pl.DataFrame(pooled), pl.DataFrame(tensor_rows(rows, names)), summary, {}).save(output)
    return time.thread_time() - start


def lapack_seconds(opened: RunSet) -> float:
    """CPU seconds of the top 16 by `numpy.linalg.eigh`, from every eighth matrix of each shape (at least one)."""
    matrices = sorted((t for t in opened.tensors if t.first.is_matrix), key=lambda t: t.shape)
    total = 0.0
    buffers = Buffers()
    with threadpool_limits(1):
        for _, group in itertools.groupby(matrices, key=lambda t: t.shape):
            alike = list(group)
            timed = alike[::8]
            start = time.thread_time()
            for tensor in timed:
                before, after, _ = opened.read(tensor, "bf16", buffers)
                source = before.view(ml_dtypes.bfloat16).reshape(tensor.shape).astype(np.float64)
                for run in after:
                    delta = run.view(ml_dtypes.bfloat16).reshape(tensor.shape).astype(np.float64) - source
                    delta = delta if delta.shape[0] >= delta.shape[1] else delta.T
                    vectors = np.linalg.eigh(delta.T @ delta)[1][:, -16:]
                    delta @ vectors
            total += (time.thread_time() - start) * len(alike) / len(timed)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--draws", type=int, default=3, help="of the null, in the run whose memory is measured")
    arguments = parser.parse_args()
    if len(arguments.paths) in (1, 2):
        parser.error("give SOURCE and two runs or more, or nothing")
    with tempfile.TemporaryDirectory() as temporary:
        paths = arguments.paths or synthetic_runs(Path(temporary))
        with threadpool_limits(1), open_runs(paths[0], paths[1:]) as opened:
            buffers = Buffers()
            one_tensor(opened, min(opened.tensors, key=lambda tensor: tensor.count), buffers)  # loads what is compiled
            spent, rows = dict.fromkeys((*PARTS, "whole"), 0.0), []
            for tensor in opened.tensors:
                seen, made = zip(*(one_tensor(opened, tensor, buffers) for _ in range(arguments.runs)), strict=True)
                rows.append(made[0])
                for name in spent:
                    spent[name] += min(one[name] for one in seen)
            output = Path(temporary) / "out"
            tables = min(tables_seconds(rows, opened.names, output) for _ in range(arguments.runs))
            peer = lapack_seconds(opened)
            largest = max(tensor.count for tensor in opened.tensors)
        options = ["--fresh", "--quiet", "--jobs", "1", "--null-draws", str(arguments.draws), "-o", str(output)]
        process = run_process(command("deltalens", "compare", *map(str, paths), *options))
    print(f"{machine()}; {len(paths) - 1} runs")
    for name in PARTS:
        print(f"{name:32} {spent[name]:7.2f} s")
    alone = sum(spent[name] for name in PARTS)
    print(f"{'parts alone':32} {alone:7.2f} s")
    print(f"{'comparison':32} {spent['whole']:7.2f} s   {spent['whole'] / alone:.2f} × the parts")
    whole = spent["whole"] + tables
    print(f"{'with its tables and page':32} {whole:7.2f} s   {whole / alone:.2f} × the parts")
    print(f"{f'a process, {arguments.draws} draws a run':32} {process.cpu:7.2f} s, {process.peak / 1e6:.0f} MB peak")
    print(f"top 16 by numpy.linalg.eigh ÷ ours: {peer / spent[PARTS[1]]:.1f}")
    limit = 500e6 + 16 * largest
    print(f"peak ÷ (500 MB + 4 × the largest tensor in float32 = {limit / 1e6:.0f} MB): {process.peak / limit:.2f}")


if __name__ == "__main__":
    main()
