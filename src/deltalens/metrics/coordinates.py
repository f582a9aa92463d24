"""One fused pass over both sides of a tensor: counts, energies and histograms, from which the rest is read off.

bf16 words need no sort and no second look: there are 32768 magnitudes, so every quantile, energy and mask is a sum
over a histogram. float32 and float64 are binned by the upper 16 bits of the float32 magnitude, and only the
bins in which a wanted quantile falls are looked at again. Definitions: METRICS.md, "Coordinates".
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np

from deltalens.metrics.coordinate_kernels import (
    BINS,
    MOVES,
    NONFINITE,
    RELATIVE_SHARE,
    count_words,
    inside_smallest,
    read_off,
)
from deltalens.metrics.values import ceil_share, round_threshold, word_values

__all__ = [
    "BINS",
    "RELATIVE_SHARE",
    "SPARSITY_THRESHOLDS",
    "TOP_SHARES",
    "Coordinates",
    "WordTables",
    "count_same_bits",
    "from_floats",
    "from_words",
    "low_magnitude_coverage",
    "measure_coordinates",
]

SPARSITY_THRESHOLDS: Mapping[str, float] = {f"1e-{e:02d}": float(f"1e-{e}") for e in (8, 7, 6, 5, 4)}
TOP_SHARES: Mapping[str, float] = {"0.1pct": 0.001, "1pct": 0.01, "5pct": 0.05}
_FLUSH = 1 << 30  # elements a call of `count_words` takes at most


def _no_counts() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates:
    """What one pass over W and W₊ found; Δ = W₊ − W in the compare dtype.

    size: N.  nonfinite: coordinates with NaN or ±Inf on either side; where this is not 0, every other field but
    `size` and `unchanged_bits` is zero or empty and stands for "undefined".
    unchanged: Δ = 0.  unchanged_bits: the same stored bits.  visible: |Δ| > τ.  nonzero: Δ ≠ 0.
    sparsity_at: keys of `SPARSITY_THRESHOLDS`, number with |Δ| ≤ that (rounded as τ is).
    relative_sparse: |Δ| ≤ 1e-3 · max(|W|, |W₊|).  source_energy, delta_energy: ‖W‖², ‖Δ‖² in float64.
    top_energy: keys of `TOP_SHARES`, energy of the ⌈share · N⌉ largest |Δ|.
    words: int64[K], the magnitudes of source weights that occur, ascending: the bf16 word without its sign, or the
    upper 16 bits of the float32 without its sign.  weights_by_word, visible_by_word, nonzero_by_word: int64[K], the
    coordinates of each, and the updates among them.
    exact_bins: whether all weights of a word are equal (bf16), so that ties are known from these counts.
    low_magnitude: for float sides, ratio → (visible, nonzero) updates inside the low-magnitude mask, ties fractional.
    """

    size: int
    nonfinite: int
    unchanged_bits: int
    unchanged: int = 0
    visible: int = 0
    nonzero: int = 0
    sparsity_at: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(SPARSITY_THRESHOLDS, 0))
    relative_sparse: int = 0
    source_energy: float = 0.0
    delta_energy: float = 0.0
    top_energy: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(TOP_SHARES, 0.0))
    words: np.ndarray = field(default_factory=_no_counts)
    weights_by_word: np.ndarray = field(default_factory=_no_counts)
    visible_by_word: np.ndarray = field(default_factory=_no_counts)
    nonzero_by_word: np.ndarray = field(default_factory=_no_counts)
    exact_bins: bool = True
    low_magnitude: Mapping[float, tuple[float, float]] = field(default_factory=dict)


def measure_coordinates(
    source: np.ndarray,
    trained: np.ndarray,
    *,
    threshold: float,
    stored: tuple[np.ndarray, np.ndarray] | None = None,
    ratios: Sequence[float] = (),
) -> Coordinates:
    """Measure one tensor's coordinates.

    `source`, `trained`: flat and prepared by `values.prepare`, of one length (where only one is float64 the other is
    widened). `threshold`: τ, already rounded by `values.round_threshold`. `stored`: both sides' stored bytes (flat
    uint8), needed for `unchanged_bits` wherever preparing was a cast; without it the prepared values' bits count.
    `ratios`: sizes of the low-magnitude masks that `low_magnitude_coverage` will be asked for; bf16 needs none.
    """
    assert source.size == trained.size, (source.size, trained.size)
    if not source.size:
        return Coordinates(size=0, nonfinite=0, unchanged_bits=0)
    same_bits = None
    if stored is not None and not all(map(np.may_share_memory, (source, trained), stored)):
        same_bits = count_same_bits(*stored, size=source.size)  # one side at least is a cast; views are the bytes
    if source.dtype == np.uint16:
        return from_words(source.size, threshold, same_bits, partial(_count_words, source, trained))
    if same_bits is None:
        same_bits = count_same_bits(source.view(np.uint8), trained.view(np.uint8), size=source.size)
    if source.dtype != trained.dtype:
        source, trained = source.astype(np.float64, copy=False), trained.astype(np.float64, copy=False)
    from deltalens.metrics.float_kernels import count_floats, gather_edges

    passes = partial(count_floats, source, trained), partial(gather_edges, source, trained)
    return from_floats(source.size, source.dtype, threshold, same_bits, ratios, *passes)


def low_magnitude_coverage(coordinates: Coordinates, ratio: float) -> tuple[float | None, float | None]:
    """Share of the visible and of the nonzero updates within the ⌈ratio · N⌉ smallest |W|.

    Weights tied at the mask's edge count by the share of them that fits. None where there is no update, or a
    non-finite value. Raises KeyError for float sides whose measurement was not told `ratio`.
    """
    c = coordinates
    if c.nonfinite:
        return None, None
    if c.exact_bins:
        k = ceil_share(ratio, c.size)
        visible, nonzero = inside_smallest(c.weights_by_word, c.visible_by_word, c.nonzero_by_word, k)
    else:
        visible, nonzero = c.low_magnitude[ratio]
    return (visible / c.visible if c.visible else None), (nonzero / c.nonzero if c.nonzero else None)


def count_same_bits(source: np.ndarray, trained: np.ndarray, *, size: int) -> int:
    """Number of the `size` elements whose stored bytes (flat uint8) are the same on both sides.

    Elements of different widths are never the same; of one width, the caller sees to it that the dtype is one too.
    """
    if source.size != trained.size or not size:
        return 0
    width = source.size // size
    words = np.dtype(f"<u{width}")
    step, same = 1 << 20, 0
    for start in range(0, source.size, step):
        chunk = slice(start, start + step)
        same += int(np.count_nonzero(source[chunk].view(words) == trained[chunk].view(words)))
    return same


# --- bf16: everything from two histograms --------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _table_words() -> np.ndarray:
    return np.array([_word(round_threshold(tau, "bf16", "BF16")) for tau in SPARSITY_THRESHOLDS.values()], np.int64)


@lru_cache(maxsize=256)  # a model has tensors of few sizes
def _top_ranks(size: int) -> np.ndarray:
    return np.array([ceil_share(share, size) for share in TOP_SHARES.values()], np.int64)


@lru_cache(maxsize=1)
def _squares() -> np.ndarray:
    return word_values(np.arange(NONFINITE + 1)).astype(np.float64) ** 2


@dataclass(slots=True)
class WordTables:
    """Zeroed tables that a thread uses again and again: fresh ones cost as much as the pass over a small matrix."""

    moves: np.ndarray = field(default_factory=lambda: np.zeros(BINS * MOVES, np.uint32))
    total: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    changed: np.ndarray = field(default_factory=lambda: np.zeros(2 * BINS, np.int64))
    delta: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))


class _Shelf(threading.local):
    """A thread's tables while they are not in use; those of a pass that failed are not put back."""

    tables: WordTables | None = None

    def take(self) -> WordTables:
        tables, self.tables = self.tables or WordTables(), None
        return tables


_SHELF = _Shelf()


def _count_words(source: np.ndarray, trained: np.ndarray, threshold: int, tables: WordTables) -> int:
    chunks = [slice(start, start + _FLUSH) for start in range(0, source.size, _FLUSH)]
    rest = threshold, tables.moves, tables.total, tables.changed, tables.delta
    return sum(count_words(source[chunk], trained[chunk], *rest) for chunk in chunks)


def from_words(size: int, threshold: float, same_bits: int | None, count: Callable[..., int]) -> Coordinates:
    """Coordinates of bf16 sides from one pass: `count` is `count_words` (or its twin on a device) bound to both sides.

    Without `same_bits` the words are the stored ones.
    """
    tables = _SHELF.take()
    nonfinite = count(_word(threshold), tables)
    top_energy, below = np.zeros(len(TOP_SHARES)), np.zeros(len(SPARSITY_THRESHOLDS), np.int64)
    *by_word, differ, bad, source_energy, delta_energy = read_off(
        tables.total, tables.changed, tables.delta, _squares(), _top_ranks(size), _table_words(), top_energy, below
    )
    _SHELF.tables = tables
    nonfinite += bad
    if same_bits is None:
        same_bits = size - differ
    if nonfinite:
        return Coordinates(size=size, nonfinite=nonfinite, unchanged_bits=same_bits)
    words, weights, visible_by_word, nonzero_by_word = by_word
    visible, nonzero = int(visible_by_word.sum()), int(nonzero_by_word.sum())
    below += size - nonzero
    return Coordinates(
        size=size,
        nonfinite=0,
        unchanged_bits=same_bits,
        unchanged=size - nonzero,
        visible=visible,
        nonzero=nonzero,
        sparsity_at=dict(zip(SPARSITY_THRESHOLDS, below.tolist(), strict=True)),
        relative_sparse=size - nonzero,  # a step is at least 2^-8 of the larger weight, so only Δ = 0 is under η
        source_energy=source_energy,
        delta_energy=delta_energy,
        top_energy=dict(zip(TOP_SHARES, top_energy.tolist(), strict=True)),
        words=words,
        weights_by_word=weights,
        visible_by_word=visible_by_word,
        nonzero_by_word=nonzero_by_word,
    )


def _word(threshold: float) -> int:
    """The largest word whose value is ≤ `threshold` (non-negative)."""
    return int(np.float32(threshold).view(np.uint32)) >> 16


# --- float32, float64: histograms of the upper bits, and a second look at the bins where a quantile falls -------------


def from_floats(
    size: int,
    dtype: np.dtype,
    threshold: float,
    same_bits: int,
    ratios: Sequence[float],
    count: Callable[..., None],
    gather: Callable[..., None],
) -> Coordinates:
    """Coordinates of float32 or float64 sides: `count` and `gather` are `count_floats` and `gather_edges` (or their
    twins on a device) bound to both sides.
    """
    stored = "F64" if dtype == np.float64 else "F32"
    table = [round_threshold(tau, "stored", stored) for tau in SPARSITY_THRESHOLDS.values()]
    counts, total, changed = np.zeros(8, np.int64), np.zeros(BINS, np.int64), np.zeros(4 * BINS, np.int64)
    energy = np.zeros(BINS + 1)
    count(np.array([threshold, *table], dtype), counts, total, changed, energy)
    if counts[7]:
        return Coordinates(size=size, nonfinite=int(counts[7]), unchanged_bits=same_bits, exact_bins=False)

    visible_histogram, nonzero_histogram, delta = (np.ascontiguousarray(changed[i::4]) for i in range(3))
    source_energy, energy = float(energy[BINS]), energy[:BINS]
    above = np.cumsum(delta[::-1])[::-1] - delta  # changed coordinates in larger bins
    before = np.cumsum(total) - total
    # The bin in which the k-th largest |Δ| falls, and the k-th smallest |W|; none where fewer changed than k.
    top = {
        key: (k := ceil_share(share, size), int(np.searchsorted(-above, 1 - k))) for key, share in TOP_SHARES.items()
    }
    low = {ratio: (k := ceil_share(ratio, size), max(int(np.searchsorted(before, k)) - 1, 0)) for ratio in ratios}
    want_w, want_d = np.zeros(BINS, bool), np.zeros(BINS, bool)
    want_w[[edge for k, edge in low.values() if k]] = True
    want_d[[edge for k, edge in top.values() if above[edge] + delta[edge] > k]] = True
    weights, deltas = np.empty(int(total[want_w].sum()), dtype), np.empty(int(delta[want_d].sum()), dtype)
    flags = np.empty(weights.size, np.uint8)
    if weights.size or deltas.size:
        gather(float(dtype.type(threshold)), want_w, want_d, weights, flags, deltas)
    weight_bins, delta_bins = _bins(weights), _bins(deltas)

    top_energy = {}
    for key, (k, edge) in top.items():
        part = float(energy[edge])
        if want_d[edge]:
            inside, take = deltas[delta_bins == edge], int(k - above[edge])
            inside = np.partition(inside, inside.size - take)[inside.size - take :].astype(np.float64)
            part = float((inside * inside).sum())
        top_energy[key] = float(energy[edge + 1 :].sum()) + part
    low_magnitude = {}
    for ratio, (k, edge) in low.items():
        here, take = weight_bins == edge, int(k - before[edge])
        low_magnitude[ratio] = (
            float(visible_histogram[:edge].sum()) + _smallest(weights[here], take, flags[here] & 2 != 0),
            float(nonzero_histogram[:edge].sum()) + _smallest(weights[here], take, flags[here] & 1 != 0),
        )
    nonzero, words = int(nonzero_histogram.sum()), np.flatnonzero(total)
    return Coordinates(
        size=size,
        nonfinite=0,
        unchanged_bits=same_bits,
        unchanged=size - nonzero,
        visible=size - int(counts[0]),
        nonzero=nonzero,
        sparsity_at=dict(zip(SPARSITY_THRESHOLDS, counts[1:6].tolist(), strict=True)),
        relative_sparse=int(counts[6]),
        source_energy=source_energy,
        delta_energy=float(energy.sum()),
        top_energy=top_energy,
        words=words,
        weights_by_word=total[words],
        visible_by_word=visible_histogram[words],
        nonzero_by_word=nonzero_histogram[words],
        exact_bins=False,
        low_magnitude=low_magnitude,
    )


def _bins(magnitudes: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return (magnitudes.astype(np.float32).view(np.uint32) >> 16).astype(np.int32)


def _smallest(weights: np.ndarray, take: int, chosen: np.ndarray) -> float:
    """How many of `chosen` lie among the `take` smallest `weights`, those tied at the edge by the share that fits."""
    if take <= 0 or not weights.size:
        return 0.0
    edge = np.partition(weights, take - 1)[take - 1]
    below, tied = weights < edge, weights == edge
    fits = (take - np.count_nonzero(below)) / np.count_nonzero(tied)
    return float(np.count_nonzero(chosen & below) + fits * np.count_nonzero(chosen & tied))
