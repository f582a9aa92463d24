"""`deltalens compare` against the sum of its parts, and its peak memory against 500 MB + 4 × the largest tensor.

    python benchmarks/bench_compare.py [SOURCE RUN RUN...] [--runs 3] [--jobs 1] [--draws 3]

Without paths it makes a source and three runs at the shapes of SmolLM2-135M. The parts, on the same tensors and as many
threads as the comparison: reading every file once and the coordinate pass of each run (`measure_coordinates`, what
`analyze` does), and the top 16 singular directions of each Δ, by the comparison's own routine and, as the named peer,
by LAPACK through `numpy.linalg.eigh` of the smaller Gram matrix (timed on every eighth matrix and scaled by the flops).
The simulated null's draws are counted apart, and what a process costs by itself, taken from a comparison of two runs'
norms. CPU seconds, since a loaded machine stretches wall time; medians.
"""

import argparse
import itertools
import statistics
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from bench_analyze import synthetic_pair
from processes import command, machine, run_process
from safetensors.numpy import load_file, save_file
from threadpoolctl import threadpool_limits

from deltalens.analysis.engine import run_all
from deltalens.analysis.pair import Buffers, Measured
from deltalens.analysis.runs import RunSet, RunTensor, open_runs
from deltalens.metrics.coordinates import measure_coordinates
from deltalens.metrics.overlap import leading_subspaces
from deltalens.metrics.values import round_threshold

TAU = round_threshold(1e-5, "bf16", "BF16")


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


def over_tensors(opened: RunSet, work, jobs: int) -> float:
    """Seconds of CPU of `work(tensor, buffers)` over every tensor on the comparison's own engine."""
    spent, lock = [0.0], threading.Lock()

    def one(tensor: RunTensor, buffers: Buffers) -> Measured:
        start = time.thread_time()
        work(tensor, buffers)
        with lock:
            spent[0] += time.thread_time() - start
        return Measured({"name": tensor.name})

    run_all(opened.tensors, one, gate=opened.gate(len(opened.runs) + 2), jobs=jobs)
    return spent[0]


def parts(opened: RunSet, jobs: int) -> dict[str, float]:
    """CPU seconds of each part."""

    def coordinates(tensor: RunTensor, buffers: Buffers) -> None:
        before, after, _ = opened.read(tensor, "bf16", buffers)
        for run in after:
            measure_coordinates(before, run, threshold=TAU)

    def reading(tensor: RunTensor, buffers: Buffers) -> None:
        opened.read(tensor, "bf16", buffers)

    def subspaces(tensor: RunTensor, buffers: Buffers) -> None:
        before, after, _ = opened.read(tensor, "bf16", buffers)
        if tensor.first.is_matrix:
            for run in after:
                leading_subspaces(before.reshape(tensor.shape), run.reshape(tensor.shape))

    read = over_tensors(opened, reading, jobs)
    return {
        "reading and coordinate passes": over_tensors(opened, coordinates, jobs),
        "top 16 of each Δ": over_tensors(opened, subspaces, jobs) - read,
    }


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
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--draws", type=int, default=3, help="of the null, in the run whose memory is measured")
    arguments = parser.parse_args()
    if len(arguments.paths) in (1, 2):
        parser.error("give SOURCE and two runs or more, or nothing")
    with tempfile.TemporaryDirectory() as temporary:
        paths = arguments.paths or synthetic_runs(Path(temporary))
        options = ["--fresh", "--quiet", "--jobs", str(arguments.jobs), "-o", str(Path(temporary) / "out")]

        def line(runs: list[Path], draws: int) -> list[str]:
            names = map(str, [paths[0], *runs])
            return command("deltalens", "compare", *names, *options, "--null-draws", str(draws))

        norms = [*line(paths[1:3], 0), "--include", "*norm*"]
        with open_runs(paths[0], paths[1:]) as opened:
            parts(opened, arguments.jobs)  # fills the page cache
            # In turns: a machine that slows down for a minute slows both sides.
            measured, start, whole = [], [], []
            for _ in range(arguments.runs):
                measured.append(parts(opened, arguments.jobs))
                start.append(run_process(norms).cpu)
                whole.append(run_process(line(paths[1:], 0)))
            peer = lapack_seconds(opened)
            largest = max(tensor.count for tensor in opened.tensors)
        drawn = run_process(line(paths[1:], arguments.draws))
    print(f"{machine()}; {len(paths) - 1} runs, {arguments.jobs} threads, median of {arguments.runs}")
    for name in measured[0]:
        print(f"{name:32} {statistics.median(one[name] for one in measured):7.2f} s CPU")
    totals = [sum(one.values()) for one in measured]
    compared = [one.cpu for one in whole]
    ratio = statistics.median((c - s) / t for c, s, t in zip(compared, start, totals, strict=True))
    with_start = statistics.median(c / t for c, t in zip(compared, totals, strict=True))
    print(f"{'a process, two runs, norms alone':32} {statistics.median(start):7.2f} s CPU")
    print(f"{'compare, no draws':32} {statistics.median(compared):7.2f} s CPU, {whole[0].peak / 1e6:.0f} MB peak")
    print(f"{f'compare, {arguments.draws} draws a run':32} {drawn.cpu:7.2f} s CPU, {drawn.peak / 1e6:.0f} MB peak")
    limit = 500e6 + 16 * largest
    print(f"compare ÷ its parts: {ratio:.2f}, with the process's start {with_start:.2f}")
    print(
        f"top 16 by numpy.linalg.eigh ÷ ours: {peer / statistics.median(m['top 16 of each Δ'] for m in measured):.1f}"
    )
    print(f"peak ÷ (500 MB + 4 × the largest tensor in float32 = {limit / 1e6:.0f} MB): {drawn.peak / limit:.2f}")


if __name__ == "__main__":
    main()
