"""What rounding alone makes two runs' updates share: expected joint counts and moments.

Definitions: METRICS.md, "Between runs". The null: two updates without any preference, each Gaussian with its own scale
and rounded by itself, share nothing but the spacing of the grid. At a weight w they are independent, so the overlap to
expect is Σ P_A(w) P_B(w) over the weights: more than p_A·p_B, since both find the small weights easier to move.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from scipy.special import erfc

from deltalens.metrics.rounding_null import RoundingNull

__all__ = ["expected_intersections", "expected_moments"]

SMOOTH = 16  # spacings a scale from which a rounded step is as good as one that is not


def expected_intersections(histogram: np.ndarray, nulls: Sequence[RoundingNull | None]) -> list[float | None]:
    """Σ P_A(w) P_B(w) over the weights: the coordinates that both change where they share nothing but the spacing.

    Args:
        histogram: int64[32768], weights by magnitude word.
        nulls: fitted to these weights and each run's own density; None where no scale explains it.

    Returns:
        One for each of `itertools.combinations(nulls, 2)`, in that order; None where a null is.
    """
    words = np.flatnonzero(histogram)
    chance = np.array([np.zeros(words.size) if null is None else null.probability for null in nulls])
    shared = (chance * histogram[words]) @ chance.T
    return [
        None if nulls[a] is None or nulls[b] is None else float(shared[a, b])
        for a, b in combinations(range(len(nulls)), 2)
    ]


def expected_moments(
    histogram: np.ndarray, nulls: Sequence[RoundingNull | None], taus: Sequence[float]
) -> list[tuple[float, ...] | None]:
    """What `Joint.visible` and `Joint.moments` are to be under the rounding null of a bf16 grid: (6,) a pair of runs.

    Given w the two updates are independent, so each expectation is Σ_w of a product. A step of several spacings is
    taken to find the spacing at w all along, which is off only near the powers of two. Arguments and order as in
    `expected_intersections`; `taus`: each run's threshold, rounded to bf16.
    """
    words = np.flatnonzero(histogram)
    lines = np.zeros((len(nulls), 3, words.size))  # P(visible), E|Δ|, EΔ² by word
    for line, null, tau in zip(lines, nulls, taus, strict=True):
        if null is not None:
            line[0] = null.probability
            line[1:] = _word_moments(words, null.scale, tau)
    flat = lines.reshape(3 * len(nulls), words.size)
    shared = ((flat * histogram[words]) @ flat.T).reshape(len(nulls), 3, len(nulls), 3)
    found: list[tuple[float, ...] | None] = []
    for a, b in combinations(range(len(nulls)), 2):
        if nulls[a] is None or nulls[b] is None:
            found.append(None)
            continue
        one = shared[a, :, b]
        found.append(tuple(float(x) for x in (one[0, 0], one[1, 0], one[0, 1], one[2, 0], one[0, 2], one[1, 1])))
    return found


def _word_moments(words: np.ndarray, scale: float, tau: float) -> np.ndarray:
    """E[|Δ|; |Δ| > τ] and E[Δ²; |Δ| > τ] of bf16(w + s·N) − w at these magnitude words: float64 (2, words)."""
    exponents, which = np.unique(words >> 7, return_inverse=True)
    spacing = np.ldexp(1.0, np.maximum(exponents, 1) - 127 - 7)
    moments = np.empty((2, exponents.size))
    root = np.sqrt(2.0) * scale
    smooth = spacing < scale / SMOOTH
    x = tau / scale
    density = np.sqrt(2 / np.pi) * np.exp(-0.5 * x * x)
    moments[0, smooth] = scale * density
    moments[1, smooth] = scale**2 * (erfc(x / np.sqrt(2.0)) + x * density)
    step = spacing[~smooth, None]
    start = np.floor(tau / step) + 1.0  # spacings of the smallest visible Δ
    j = start + np.arange(8 * SMOOTH)  # beyond, 8 scales away, nothing is left
    reached = erfc((j - 0.5) * step / root)  # P(|Δ| ≥ j spacings)
    moments[0, ~smooth] = (step * (reached.sum(axis=1, keepdims=True) + (start - 1) * reached[:, :1]))[:, 0]
    squares = ((2 * j - 1) * reached).sum(axis=1, keepdims=True) + (start - 1) ** 2 * reached[:, :1]
    moments[1, ~smooth] = (step**2 * squares)[:, 0]
    return moments[:, which]
