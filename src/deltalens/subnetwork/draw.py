"""How the entries of a mask are chosen from scores: pure functions on arrays, exact counts, ties drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from deltalens.metrics.blocks import block_slices, is_tall, value_blocks
from deltalens.metrics.rounding_null import RoundingNull
from deltalens.metrics.spectrum import Factorisation, factorise

__all__ = ["TIE_TOLERANCE", "kth_largest", "largest", "leading", "rank_of", "reconstruction", "rounding_scores"]

TIE_TOLERANCE = 1e-9  # of the largest |R|: METRICS.md, "Masks against the source"
_DIGIT = 16


def largest(scores: np.ndarray, count: int, rng: np.random.Generator, tolerance: float = 0.0) -> np.ndarray:
    """The `count` largest of `scores`, as bool[N]; those tied at the edge are drawn at random.

    Args:
        scores: (N,) float32 or float64, no NaN; ±Inf are ordinary values.
        count: 0 … N; exactly as many are chosen.
        rng: draws among the ties.
        tolerance: scores as near as this to the edge count as tied.
    """
    if count <= 0:
        return np.zeros(scores.size, np.bool_)
    if count >= scores.size:
        return np.ones(scores.size, np.bool_)
    edge = np.partition(scores, scores.size - count)[scores.size - count]
    chosen = scores > edge + tolerance
    tied = np.flatnonzero(~chosen & (scores >= edge - tolerance))
    missing = count - int(np.count_nonzero(chosen))
    chosen[tied if missing == tied.size else rng.choice(tied, missing, replace=False, shuffle=False)] = True
    return chosen


def kth_largest(parts: Callable[[], Iterable[np.ndarray]], count: int) -> tuple[float, int, int]:
    """The `count`-th largest of non-negative values that come in parts, how many are larger, and how many equal.

    The bits of a non-negative float order as the float does: each pass over the parts counts the next 16 of them among
    the values that share the leading ones, so that two passes settle float32 and four float64, whatever the size.

    Args:
        parts: gives the arrays (flat, all float32 or all float64) again each time it is called.
        count: 1 … number of values.
    """
    prefix = above = 0
    ties, dtype = 0, np.dtype(np.float32)
    step, width = 0, 2
    while step < width:
        table = np.zeros(1 << _DIGIT, np.int64)
        for values in parts():
            dtype = values.dtype
            width = dtype.itemsize * 8 // _DIGIT
            bits = values.view(f"u{dtype.itemsize}")
            shift = _DIGIT * (width - 1 - step)
            if step:
                bits = bits[(bits >> (shift + _DIGIT)) == prefix]
            table += np.bincount((bits >> shift) & ((1 << _DIGIT) - 1), minlength=1 << _DIGIT)
        at_least = np.cumsum(table[::-1])[::-1]
        digit = int(np.flatnonzero(above + at_least >= count)[-1])
        ties = int(table[digit])
        above += int(at_least[digit]) - ties
        prefix = prefix << _DIGIT | digit
        step += 1
    return float(np.array([prefix], f"u{dtype.itemsize}").view(dtype)[0]), above, ties


def rounding_scores(words: np.ndarray, null: RoundingNull, rng: np.random.Generator) -> np.ndarray:
    """Scores whose `count` largest are a draw of `count` weights with the null's probabilities P(visible | w).

    logit P − logit U with U uniform: above 0 it is an independent draw with P each; cut at the exact count instead it
    is Pareto sampling (Rosén 1997, "On sampling with probability proportional to size"), whose inclusion
    probabilities are P up to a share that falls as 1 / count, since the null is fitted so that ΣP = count.

    Args:
        words: (N,) integers, each weight's magnitude word (the null's index).

    Returns:
        float32[N]; −Inf where the null says never.
    """
    p = null.table()
    with np.errstate(divide="ignore"):
        logit = (np.log(p) - np.log1p(-p)).astype(np.float32)
    uniform = np.maximum(rng.random(words.size, np.float32), np.float32(2.0**-25))
    scores = np.log1p(-uniform)
    scores -= np.log(uniform)
    scores += logit[words]
    return scores


def rank_of(ratio: float, shape: tuple[int, int]) -> int:
    """k = max(1, ⌊ratio · min(m, n)⌋), as METRICS.md has it."""
    return max(1, int(ratio * min(shape) + 1e-9))


def leading(values: np.ndarray, k: int) -> Factorisation:
    """Top-k factorisation of a matrix (m, n) of prepared values (uint16 words, float32 or float64)."""
    return factorise(lambda: value_blocks(values), max(values.shape), min(values.shape), k)


def reconstruction(values: np.ndarray, k: int) -> np.ndarray:
    """|R|, (m, n) float64, of the rank-k reconstruction R of a matrix of prepared values."""
    factors = leading(values, k)
    out = np.empty(values.shape)
    scaled = factors.short * factors.values[:k]
    for part in block_slices(values.shape):
        if is_tall(values.shape):
            np.matmul(factors.long[part], scaled.T, out=out[part])
        else:
            out[:, part] = scaled @ factors.long[part].T
    return np.abs(out, out=out)
