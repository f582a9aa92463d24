"""How much memory the analysis of one matrix holds, and how much all that are under way may hold together.

The bound (issue 11): 500 MB and 4 × the largest tensor in float32, whatever the model and the number of threads. The
figures below lie above every peak that was measured (docs/performance.md; benchmarks/bench_bound.py, bench_memory.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from deltalens.analysis.settings import Settings
from deltalens.checkpoint.pairing import TensorPair

__all__ = ["SMALL_ELEMENTS", "held_bytes", "room_for"]

PAIR_BYTES = 16 << 20  # whatever the shape: blocks, tables of words, the space between allocations
FACTOR_BYTES = 20  # an element, if all singular vectors were taken: two sides' long ones, packed masks
GRAM_BYTES = 10  # an entry of the (d, d) matrix in float64, and vectors while it is there
DRAW_BYTES = 4  # an element: a simulated update, or one with other signs
SHUFFLE_BYTES = 9  # an element: an update, gathered by the source's exponents
PROCESS_BYTES = 265_000_000  # the interpreter and its libraries
BOUND_BYTES, BOUND_ELEMENT_BYTES = 500_000_000, 16
SMALL_ELEMENTS = 8 << 20  # tensors up to this size may always be worked on side by side, where elements are counted
SPARE_BYTES = 32 << 20  # what may always be read beside the largest tensor


def held_bytes(pair: TensorPair, settings: Settings) -> int:
    """Bytes that `measure` holds of a pair at its peak, rounded up."""
    held = PAIR_BYTES + pair.nbytes
    view, size = ("BF16", 2) if settings.compare == "bf16" else ("F32", 4)
    held += pair.count * size * sum(dtype != view for dtype in (pair.source_dtype, pair.trained_dtype))  # cast copies
    if settings.spectrum != "none" and pair.is_matrix:
        width = min(pair.shape)
        share = max(*settings.ratios, min(settings.mask_rank or 0, width) / width)
        held += int(FACTOR_BYTES * share * pair.count) + GRAM_BYTES * width**2
        if settings.null_draws or settings.permutations:
            shuffled = settings.permutations and settings.permutation == "exponent"
            held += PAIR_BYTES + (SHUFFLE_BYTES if shuffled else DRAW_BYTES) * pair.count
    return held


def room_for(pairs: Iterable[TensorPair], settings: Settings) -> int:
    """Bytes that pairs under way may hold together: always enough for any of them alone.

    Counts alone need far less than the bound: they get a quarter beside the largest tensor, lest the other threads wait
    while one is busy with an embedding.
    """
    pairs = list(pairs)
    heaviest = max((held_bytes(pair, settings) for pair in pairs), default=0)
    if settings.spectrum == "none":
        return heaviest + max(heaviest // 4, SPARE_BYTES)
    largest = max((pair.count for pair in pairs), default=0)
    return max(heaviest, BOUND_BYTES + BOUND_ELEMENT_BYTES * largest - PROCESS_BYTES)
