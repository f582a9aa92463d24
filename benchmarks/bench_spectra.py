"""Exact spectra, matrix by matrix, against NumPy's SVD in float64 of the same bf16 weights.

    python benchmarks/bench_spectra.py [--shapes 576x576 1536x576 1536x1536 8960x1536] [--runs 3]

One BLAS thread. `values` is every singular value, as of Δ; `factors` these and the leading 20 % of the vectors of both
sides, as of W and W₊. The peer computes values (`numpy.linalg.svd(compute_uv=False)`: bidiagonalisation and dqds)
from a float64 copy, whose making is counted. Medians of runs in turns. The largest difference is over all values, in
units of σ₁.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from processes import machine
from threadpoolctl import threadpool_limits

from deltalens.metrics.blocks import at_hand, value_blocks
from deltalens.metrics.spectrum import factorise, singular_values
from deltalens.metrics.values import round_to_bf16, word_values

SHAPES = ("576x576", "1536x576", "1536x1536", "8960x1536")


def timed(work: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxCOLUMNS")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{machine()}; one thread")
    print(f"{'':12} {'NumPy values':>13} {'values':>18} {'factors':>18}   largest difference")
    for text in arguments.shapes:
        shape = rows, columns = tuple(int(side) for side in text.split("x"))
        weights = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(0.02)
        words = round_to_bf16(weights).reshape(shape)
        long, width = max(shape), min(shape)

        def numpy_values(words: np.ndarray = words) -> np.ndarray:
            return np.linalg.svd(word_values(words).astype(np.float64), compute_uv=False)

        def values(words: np.ndarray = words, long: int = long, width: int = width) -> np.ndarray:
            return singular_values(at_hand(partial(value_blocks, words), words.shape), long, width)

        def factors(words: np.ndarray = words, long: int = long, width: int = width) -> np.ndarray:
            return factorise(at_hand(partial(value_blocks, words), words.shape), long, width, width // 5).values

        with threadpool_limits(1):
            turns = [[timed(work) for work in (numpy_values, values, factors)] for _ in range(arguments.runs)]
        peer, ours, both = (statistics.median(turn[i][0] for turn in turns) for i in range(3))
        reference = turns[0][0][1]
        error = max(float(np.abs(turn[i][1] - reference).max()) for turn in turns for i in (1, 2)) / reference[0]
        print(
            f"{rows:6} × {columns:<5} {peer:11.3f} s {ours:9.3f} s {peer / ours:4.1f} × "
            f"{both:9.3f} s {peer / both:4.1f} ×   {error:.0e} σ₁"
        )


if __name__ == "__main__":
    main()
