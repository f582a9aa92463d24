"""The coordinate pass against (1) reading and comparing the same bytes and (2) the same numbers by NumPy's sorts.

    python benchmarks/bench_coordinates.py [SOURCE TRAINED]     two checkpoints of equal tensors
    python benchmarks/bench_coordinates.py                      a synthetic bf16 pair of 2 × 256 MB

One thread, files in the page cache. Each figure is the median of runs in turns (twenty-one, of sorting one).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from deltalens.checkpoint.base import Checkpoint
from deltalens.checkpoint.open import open_checkpoint
from deltalens.metrics.coordinates import SPARSITY_THRESHOLDS, TOP_SHARES, low_magnitude_coverage, measure_coordinates
from deltalens.metrics.rounding_null import expected_low_magnitude_coverage, fit_all
from deltalens.metrics.values import ceil_share, prepare, round_threshold

RUNS = 21
PIECE = 1 << 18  # elements


def synthetic_pair(folder: Path) -> tuple[Path, Path]:
    """Sixteen 2048 × 4096 bf16 matrices a side; a third of the coordinates differ."""
    rng = np.random.default_rng(0)
    sides: tuple[dict, dict] = {}, {}
    for i in range(16):
        weights = rng.standard_normal((2048, 4096), np.float32) * np.float32(0.02)
        source = weights.astype(ml_dtypes.bfloat16)
        moved = source.astype(np.float32) + rng.standard_normal(weights.shape, np.float32) * np.float32(3e-5)
        sides[0][f"layers.{i}.weight"], sides[1][f"layers.{i}.weight"] = source, moved.astype(ml_dtypes.bfloat16)
    paths = folder / "source.safetensors", folder / "trained.safetensors"
    for tensors, path in zip(sides, paths, strict=True):
        save_file(tensors, path)
    return paths


def over_pairs(source: Checkpoint, trained: Checkpoint, use: Callable[[np.ndarray, np.ndarray, str], object]) -> None:
    buffers = [np.empty(max(e.nbytes for e in side.entries.values()), np.uint8) for side in (source, trained)]
    for name, entry in source.entries.items():
        use(source.read(name, buffers[0]), trained.read(name, buffers[1]), entry.dtype)


def compare_bytes(source: np.ndarray, trained: np.ndarray, dtype: str) -> bool:
    return bool(np.array_equal(source, trained))


def compare_in_pieces(source: Checkpoint, trained: Checkpoint) -> None:
    """The same, read in pieces that stay in a core's cache."""
    buffers = [np.empty(2 * PIECE, np.uint8) for _ in range(2)]
    for name, entry in source.entries.items():
        for start in range(0, entry.size, PIECE):
            part = {"start": start, "count": min(PIECE, entry.size - start)}
            compare_bytes(source.read(name, buffers[0], **part), trained.read(name, buffers[1], **part), entry.dtype)


def ours(source: np.ndarray, trained: np.ndarray, dtype: str) -> None:
    tau = round_threshold(1e-5, "bf16", dtype)
    stored = None if dtype == "BF16" else (source, trained)
    c = measure_coordinates(
        prepare(source, dtype, "bf16"), prepare(trained, dtype, "bf16"), threshold=tau, stored=stored
    )
    low_magnitude_coverage(c, 0.1)
    for null in fit_all(c.words, c.weights_by_word, [(c.visible, tau, "bf16"), (c.nonzero, 0.0, "bf16")]):
        if null is not None:
            expected_low_magnitude_coverage(null, [0.1])


def by_sorting(source: np.ndarray, trained: np.ndarray, dtype: str) -> None:
    """The same counts, energies and mask coverage, without the null, as one would write them in NumPy."""
    w = prepare(source, dtype, "fp32")
    delta = np.abs((prepare(trained, dtype, "fp32") - w).astype(ml_dtypes.bfloat16).astype(np.float32))
    w = np.abs(w)
    visible = delta > round_threshold(1e-5, "bf16", dtype)
    np.count_nonzero(delta), np.count_nonzero(visible), np.count_nonzero(source == trained)
    for tau in SPARSITY_THRESHOLDS.values():
        np.count_nonzero(delta <= round_threshold(tau, "bf16", dtype))
    np.sum(w * w, dtype=np.float64), np.sum(delta * delta, dtype=np.float64)
    for share in TOP_SHARES.values():
        k = ceil_share(share, delta.size)
        np.sum(np.partition(delta, delta.size - k)[delta.size - k :] ** 2, dtype=np.float64)
    edge = np.partition(w, ceil_share(0.1, w.size) - 1)[ceil_share(0.1, w.size) - 1]
    np.count_nonzero(visible & (w < edge)), np.count_nonzero(visible & (w == edge))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", nargs="*", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = arguments.pair or synthetic_pair(Path(folder))
        with open_checkpoint(paths[0]) as source, open_checkpoint(paths[1]) as trained:
            methods = {
                name: partial(over_pairs, source, trained, use)
                for name, use in (
                    ("read and compare", compare_bytes),
                    ("deltalens", ours),
                    ("NumPy, sorting", by_sorting),
                )
            }
            if all(entry.dtype == "BF16" for entry in source.entries.values()):
                methods["in pieces"] = partial(compare_in_pieces, source, trained)
            times: dict[str, list[float]] = {name: [] for name in methods}
            for run in range(RUNS + 1):
                for name, method in methods.items():
                    if name == "NumPy, sorting" and run > 1:
                        continue
                    start = time.perf_counter()
                    method()
                    if run:  # the first run fills the page cache
                        times[name].append(time.perf_counter() - start)
            gigabytes = (source.nbytes + trained.nbytes) / 1e9
            seconds = {name: statistics.median(measured) for name, measured in times.items()}
            for name, value in seconds.items():
                rate = source.parameters / value / 1e6
                print(f"{name:17} {value:7.3f} s  {gigabytes / value:6.2f} GB/s  {rate:7.0f} M elements/s")
            print(f"deltalens takes {seconds['deltalens'] / seconds['read and compare']:.2f} × reading and comparing")
            if "in pieces" in seconds:
                print(f"and {seconds['deltalens'] / seconds['in pieces']:.2f} × reading and comparing in pieces")
            print(f"deltalens is {seconds['NumPy, sorting'] / seconds['deltalens']:.0f} × faster than NumPy, sorting")


if __name__ == "__main__":
    main()
