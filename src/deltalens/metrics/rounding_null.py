"""What rounding alone makes of an update that prefers no weight: the null of METRICS.md, "Rounding null".

A weight on a grid of floating-point numbers receives a Gaussian step of scale s and is rounded. It changes visibly
where the step crosses the boundary that lies just beyond τ, so P(visible | w) depends on w's magnitude alone: small
weights lie on a finer grid and change more often. s is chosen so that the tensor's expected density is the
observed one; the expected coverage of a mask then is Σ_mask P / Σ P.

The formula counts the exact difference of the rounded and the first weight against τ. In bf16 Δ itself is rounded,
which moves the boundary by less than half a spacing of τ, for weights below 2τ only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import erfc, exp, log, log1p, pi, sqrt
from typing import Literal

import numpy as np
from numba import njit, types

from deltalens.metrics.coordinate_kernels import BINS
from deltalens.metrics.values import DOUBLES, KERNEL, SINGLES, ceil_share

__all__ = [
    "FINE_CELLS",
    "RoundingNull",
    "excess",
    "expected_low_magnitude_coverage",
    "fine_histogram",
    "fit",
    "fit_all",
]

Grid = Literal["bf16", "fp16", "fp32"]
FINE_CELLS = 16
# Mantissa bits without the leading one, exponent of the smallest normal number.
_FORMATS: dict[str, tuple[int, int]] = {"bf16": (7, -126), "fp16": (10, -14), "fp32": (23, -126)}


@dataclass(frozen=True, slots=True)
class RoundingNull:
    """A fitted null.

    scale: s.  words: int64[K], the magnitudes of weights that occur, ascending.  weights: int64[K], how many of each.
    probability: float64[K], P(visible | word).  size: number of weights.
    """

    scale: float
    words: np.ndarray
    weights: np.ndarray
    probability: np.ndarray
    size: int

    def table(self) -> np.ndarray:
        """float64[32768], P(visible | word) by word; 0 for words that do not occur."""
        table = np.zeros(BINS)
        table[self.words] = self.probability
        return table


@dataclass(frozen=True, slots=True)
class _Classes:
    """The pairs of distances that occur (float64[C], `plus` ascending); each word and cell's class, int[32768, …]."""

    plus: np.ndarray
    minus: np.ndarray
    index: np.ndarray


def fit(
    total_histogram: np.ndarray, observed_count: int | float, tau: float, grid: Grid, fine: np.ndarray | None = None
) -> RoundingNull | None:
    """Fit the scale at which the expected number of visible updates is `observed_count`, to 1e-10 of it.

    `total_histogram`: int64[32768], weights by magnitude word. `tau`: already rounded to the compare dtype; 0 for the
    null of the nonzero updates. `grid`: the numbers that both sides take. `fine`, for a source stored finer than a bf16
    grid: its `fine_histogram`; each word's P is then the mean over its weights.
    None where the density is 0 or 1, so that no scale, or any, explains it.
    """
    words = np.flatnonzero(total_histogram)
    weights = np.ascontiguousarray(total_histogram[words], np.int64)
    return fit_all(words, weights, [(observed_count, tau, grid)], fine)[0]


def fit_all(
    words: np.ndarray,
    weights: np.ndarray,
    updates: Sequence[tuple[int | float, float, Grid]],
    fine: np.ndarray | None = None,
) -> list[RoundingNull | None]:
    """`fit` for several updates of one source, each `(observed_count, tau, grid)`.

    `words`: int64[K], the magnitudes that occur, ascending. `weights`: int64[K], how many of each.
    """
    size = int(weights.sum())
    cells = np.zeros((0, 0), np.int64) if fine is None else fine
    nulls: list[RoundingNull | None] = []
    for observed_count, tau, grid in updates:
        if not 0 < observed_count < size:
            nulls.append(None)
            continue
        classes = _classes(grid, float(tau), fine is not None)
        probability = np.zeros(words.size)
        density = observed_count / size
        scale = _fit(words, weights, size, cells, classes.plus, classes.minus, classes.index, density, probability)
        nulls.append(RoundingNull(scale, words, weights, probability, size))
    return nulls


_COUNTS = types.Array(types.int64, 1, "C", readonly=True)
_CELLS = types.Array(types.int64, 2, "C", readonly=True)


@njit(**KERNEL)
def _share(fine, word, cell, cells):  # type: ignore[no-untyped-def]
    """The share of a word's weights that lie in a cell; without `fine`, and for a word with none there, all alike."""
    held = 0
    if fine.shape[0]:
        for i in range(cells):
            held += fine[word, i]
    # A weight just on a boundary may be binned next door: a word may then have weights and no cell.
    return fine[word, cell] / held if held else 1.0 / cells


def excess(observed: float | None, null: float | None) -> float | None:
    """Observed ÷ null, None where either is undefined."""
    return observed / null if observed is not None and null else None


def expected_low_magnitude_coverage(null: RoundingNull, ratios: Sequence[float]) -> list[float]:
    """Σ P over the ⌈ratio · N⌉ smallest weights ÷ Σ P: the share of the visible updates that the null puts there.

    The word at the edge counts by the share that fits. One value for each of `ratios`, which ascend.
    """
    inside = np.zeros(len(ratios))
    wanted = np.array([ceil_share(ratio, null.size) for ratio in ratios], np.int64)
    everything = _low_magnitude_mass(null.probability, null.weights, wanted, inside)
    return (inside / everything).tolist()


@njit([types.float64(DOUBLES, _COUNTS, _COUNTS, types.float64[::1])], **KERNEL)
def _low_magnitude_mass(probability, weights, wanted, inside):  # type: ignore[no-untyped-def]
    """Σ P of the `wanted` smallest weights (ascending) into `inside`; returns that of all."""
    everything = 0.0
    before = np.int64(0)
    at = 0
    for i in range(weights.size):
        while at < wanted.size and wanted[at] <= before + weights[i]:
            inside[at] = everything + (wanted[at] - before) * probability[i]
            at += 1
        before += weights[i]
        everything += weights[i] * probability[i]
    return everything


@njit([types.void(SINGLES, types.int64[::1])], **KERNEL)
def _count_cells(source: np.ndarray, counts: np.ndarray) -> None:
    bits = source.view(np.uint32)
    for i in range(bits.size):
        cell = ((bits[i] & np.uint32(0x7FFFFFFF)) + np.uint32(0x8000)) >> np.uint32(12)
        counts[min(cell, np.uint32(counts.size - 1))] += 1


def fine_histogram(source: np.ndarray) -> np.ndarray:
    """int64[32768, 16]: float32 weights (flat) by their rounded bf16 word, and where in its rounding cell they lie."""
    counts = np.zeros(BINS * FINE_CELLS, np.int64)
    _count_cells(np.ascontiguousarray(source, np.float32), counts)
    return counts.reshape(BINS, FINE_CELLS)


@lru_cache(maxsize=16)
def _classes(grid: Grid, tau: float, fine: bool) -> _Classes:
    """The two distances of every word and cell, computed once for a grid and threshold."""
    word = np.arange(BINS, dtype=np.int64)[:, None] << 16
    if grid == "bf16" and fine:
        # A cell reaches from half a spacing below the word to half above, uniform in the bits of the float32.
        bits = word - 0x8000 + (np.arange(FINE_CELLS) << 12) + 0x800
        on_grid = np.broadcast_to(word, bits.shape)
    elif grid == "bf16":
        bits = on_grid = word
    elif grid == "fp16":
        bits = on_grid = word + (np.arange(8) << 13)  # the eight numbers of binary16 that share a bf16 word
    else:
        bits = on_grid = word + 0x8000  # 65536 numbers alike but for the power of two: the middle one stands for all
    weight, centre = _float64_of(bits), _float64_of(on_grid)
    up, down = _floor(centre + tau, grid), _ceil(centre - tau, grid)
    plus = 0.5 * (up + _next_up(up, grid)) - weight
    minus = weight - 0.5 * (down + _next_down(down, grid))
    plus, minus = plus.ravel(), minus.ravel()
    order = np.lexsort((minus, plus))  # not np.unique: it loads numpy.ma, which takes longer than this function
    first = np.ones(order.size, bool)
    first[1:] = (np.diff(plus[order]) != 0) | (np.diff(minus[order]) != 0)
    index = np.empty(order.size, np.int64)
    index[order] = np.cumsum(first) - 1
    return _Classes(plus[order][first], minus[order][first], index.reshape(bits.shape))


def _float64_of(bits: np.ndarray) -> np.ndarray:
    """The float32 of a magnitude's bits as float64, with NaN and Inf as the numbers that would follow."""
    bits = np.maximum(bits, 0)
    exponent, mantissa = bits >> 23, (bits & 0x7FFFFF).astype(np.float64)
    normal = exponent > 0
    return np.ldexp(mantissa + np.where(normal, float(1 << 23), 0.0), np.where(normal, exponent, 1) - 150)


def _spacing(x: np.ndarray, grid: Grid) -> np.ndarray:
    """Distance from |x| to the next number of the grid further from zero."""
    mantissa_bits, smallest = _FORMATS[grid]
    _, exponent = np.frexp(x)
    return np.ldexp(1.0, np.maximum(np.where(x == 0, smallest, exponent - 1), smallest) - mantissa_bits)


def _floor(x: np.ndarray, grid: Grid) -> np.ndarray:
    step = _spacing(x, grid)
    return np.floor(x / step) * step


def _ceil(x: np.ndarray, grid: Grid) -> np.ndarray:
    return -_floor(-x, grid)


def _next_up(x: np.ndarray, grid: Grid) -> np.ndarray:
    """The next number above a number of the grid (of either sign)."""
    step = _spacing(x, grid)
    # Towards zero from a power of two the grid is twice as fine, unless it has reached its smallest spacing.
    fraction, _ = np.frexp(x)
    mantissa_bits, smallest = _FORMATS[grid]
    finer = (fraction == -0.5) & (step > np.ldexp(1.0, smallest - mantissa_bits))
    return x + np.where(finer, 0.5, 1.0) * step


def _next_down(x: np.ndarray, grid: Grid) -> np.ndarray:
    return -_next_up(-x, grid)


@njit(**KERNEL)
def _chance(plus, minus, scale):  # type: ignore[no-untyped-def]
    """P(visible) of one class."""
    if plus == minus:  # all words but the powers of two
        return erfc(plus / (sqrt(2.0) * scale))
    return 0.5 * (erfc(plus / (sqrt(2.0) * scale)) + erfc(minus / (sqrt(2.0) * scale)))


@njit([types.float64(DOUBLES, DOUBLES, DOUBLES, types.float64, types.float64)], **KERNEL)
def _solve_scale(plus, minus, share, density, start):  # type: ignore[no-untyped-def]
    """The s at which Σ share · P(s) = density. Newton in log s on the log-odds, held inside a bracket.

    The mean of P rises with s from 0 to 1, so there is one root; log-odds make the curve nearly straight. `start`: a
    scale to begin at.
    """
    goal = log(density) - log1p(-density)
    low, high = log(1e-46), log(1e40)
    x = log(max(start, 1e-45))
    for _ in range(200):
        scale = exp(x)
        mean = slope = 0.0
        for i in range(plus.size):
            mean += share[i] * _chance(plus[i], minus[i], scale)
            above, below = plus[i] / scale, minus[i] / scale
            slope += share[i] * above * exp(-0.5 * above * above)
            slope += share[i] * below * exp(-0.5 * below * below)
        slope /= sqrt(2.0 * pi)
        if abs(mean - density) <= 2e-12 * density:
            break
        if mean < density:
            low = x
        else:
            high = x
        x_next = 0.5 * (low + high)
        if 0.0 < mean < 1.0 and slope > 0.0:
            newton = x + (goal - log(mean) + log1p(-mean)) * mean * (1.0 - mean) / slope
            if low < newton < high:
                x_next = newton
        if x_next == x or high - low < 1e-15:
            break
        x = x_next
    return exp(x)


@njit(
    [types.float64(_COUNTS, _COUNTS, types.int64, _CELLS, DOUBLES, DOUBLES, _CELLS, types.float64, types.float64[::1])],
    **KERNEL,
)
def _fit(words, weights, size, fine, plus, minus, index, density, probability):  # type: ignore[no-untyped-def]
    """The scale at which the mean of P is `density`; P of each of `words` is written to `probability` (zero before)."""
    mass = np.zeros(plus.size)
    for i in range(words.size):
        for cell in range(index.shape[1]):
            mass[index[words[i], cell]] += weights[i] * _share(fine, words[i], cell, index.shape[1])
    used = np.flatnonzero(mass)
    share = mass[used] / size
    half, below = 0.5 * share.sum(), 0.0
    middle = used.size - 1
    for i in range(used.size):  # `plus` ascends
        below += share[i]
        if below >= half:
            middle = i
            break
    scale = _solve_scale(plus[used], minus[used], share, density, plus[used[middle]])
    for occurring in used:
        mass[occurring] = _chance(plus[occurring], minus[occurring], scale)
    for i in range(words.size):
        for cell in range(index.shape[1]):
            probability[i] += mass[index[words[i], cell]] * _share(fine, words[i], cell, index.shape[1])
    return scale
