"""One fused pass over both sides of a tensor: counts, energies and histograms, from which the rest is read off.

bf16 words need no sort and no second look: there are 32768 magnitudes, so every quantile, energy and mask is a sum
over a histogram. float32 and float64 are binned by the upper 16 bits of the float32 magnitude, and only the
bins in which a wanted quantile falls are looked at again. Definitions: METRICS.md, "Coordinates".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numba import njit, types

from deltalens.metrics.values import (
    DOUBLES,
    KERNEL,
    SINGLES,
    WORDS,
    ceil_share,
    narrow_single,
    round_threshold,
    widen_word,
    word_values,
)

__all__ = [
    "BINS",
    "RELATIVE_SHARE",
    "SPARSITY_THRESHOLDS",
    "TOP_SHARES",
    "Coordinates",
    "count_same_bits",
    "low_magnitude_coverage",
    "measure_coordinates",
]

BINS = 32768  # magnitudes of a 16-bit word
NONFINITE = 0x7F80  # words from here on are Inf and NaN
SPARSITY_THRESHOLDS: Mapping[str, float] = {f"1e-{e:02d}": float(f"1e-{e}") for e in (8, 7, 6, 5, 4)}
TOP_SHARES: Mapping[str, float] = {"0.1pct": 0.001, "1pct": 0.01, "5pct": 0.05}
RELATIVE_SHARE = 1e-3  # η of `relative_sparsity`
_FLUSH = 1 << 30  # elements between flushes of the 32-bit counters


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates:
    """What one pass over W and W₊ found; Δ = W₊ − W in the compare dtype.

    size: N.  nonfinite: coordinates with NaN or ±Inf on either side; where this is not 0, every other field but
    `size` and `unchanged_bits` is zero or empty and stands for "undefined".
    unchanged: Δ = 0.  unchanged_bits: the same stored bits.  visible: |Δ| > τ.  nonzero: Δ ≠ 0.
    sparsity_at: keys of `SPARSITY_THRESHOLDS`, number with |Δ| ≤ that (rounded as τ is).
    relative_sparse: |Δ| ≤ 1e-3 · max(|W|, |W₊|).  source_energy, delta_energy: ‖W‖², ‖Δ‖² in float64.
    top_energy: keys of `TOP_SHARES`, energy of the ⌈share · N⌉ largest |Δ|.
    total_histogram, visible_histogram, nonzero_histogram: int64[32768], coordinates by the magnitude of their source
    weight: the bf16 word without its sign, or the upper 16 bits of the float32 without its sign.
    exact_bins: whether all weights of a bin are equal (bf16), so that ties are known from the histograms.
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
    total_histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    visible_histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    nonzero_histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
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
    same_bits = None if stored is None else count_same_bits(*stored, size=source.size)
    if source.dtype == np.uint16:
        return _measure_words(source, trained, threshold, same_bits)
    if same_bits is None:
        same_bits = count_same_bits(source.view(np.uint8), trained.view(np.uint8), size=source.size)
    if source.dtype != trained.dtype:
        source, trained = source.astype(np.float64, copy=False), trained.astype(np.float64, copy=False)
    return _measure_floats(source, trained, threshold, same_bits, ratios)


def low_magnitude_coverage(coordinates: Coordinates, ratio: float) -> tuple[float | None, float | None]:
    """Share of the visible and of the nonzero updates within the ⌈ratio · N⌉ smallest |W|.

    Weights tied at the mask's edge count by the share of them that fits. None where there is no update, or a
    non-finite value. Raises KeyError for float sides whose measurement was not told `ratio`.
    """
    c = coordinates
    if c.nonfinite:
        return None, None
    if c.exact_bins:
        inside = _smallest_share(c.total_histogram, ceil_share(ratio, c.size))
        visible, nonzero = float(inside @ c.visible_histogram), float(inside @ c.nonzero_histogram)
    else:
        visible, nonzero = c.low_magnitude[ratio]
    return (visible / c.visible if c.visible else None), (nonzero / c.nonzero if c.nonzero else None)


def _smallest_share(total: np.ndarray, k: int) -> np.ndarray:
    """For each bin the share of it that lies among the k smallest: 1, a fraction at the edge, 0. float64[BINS]."""
    before = np.cumsum(total) - total
    return np.clip((k - before) / np.maximum(total, 1), 0.0, 1.0)


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


_COUNTERS32 = types.Array(types.uint32, 2, "C")
_LANES = 2  # counter tables side by side: an element equal to its neighbour need not wait for that one's store


@njit([types.int64(WORDS, WORDS, types.uint32, _COUNTERS32, _COUNTERS32, _COUNTERS32)], **KERNEL)
def _count_words(source, trained, threshold, total, changed, delta):  # type: ignore[no-untyped-def]
    """Count |W| in `total`, the changed |W| in `changed` (twice the word, plus 1 where visible), |Δ| in `delta`.

    Only coordinates whose words differ enter the last two. Returns the number whose trained word alone is non-finite.
    """
    block = 1024
    before, after = np.empty(block + 2, np.uint16), np.empty(block + 2, np.uint16)
    places, words = np.empty(block + 2, np.uint16), np.empty(block + 2, np.uint16)
    bad = 0
    for start in range(0, source.size, block):
        stop = min(start + block, source.size)
        # Gather the changed pairs without branching: at middling densities a branch is mispredicted a third of the
        # time, which costs more than all the rest.
        found = 0
        even = start + ((stop - start) & ~1)
        for i in range(start, even, 2):
            first, second = source[i], source[i + 1]
            first_after, second_after = trained[i], trained[i + 1]
            total[0, first & 0x7FFF] += np.uint32(1)
            total[1, second & 0x7FFF] += np.uint32(1)
            before[found], after[found] = first, first_after
            found += first != first_after
            before[found], after[found] = second, second_after
            found += second != second_after
        if even < stop:
            total[0, source[even] & 0x7FFF] += np.uint32(1)
            before[found], after[found] = source[even], trained[even]
            found += source[even] != trained[even]
        for j in range(found):  # vector instructions: no table is touched
            word = narrow_single(abs(np.float32(widen_word(after[j]) - widen_word(before[j]))))
            magnitude = np.uint32(before[j] & np.uint16(0x7FFF))
            trained_magnitude = np.uint32(after[j] & np.uint16(0x7FFF))
            bad += np.uint32((trained_magnitude >= np.uint32(NONFINITE)) & (magnitude < np.uint32(NONFINITE)))
            places[j] = np.uint16(np.uint32(magnitude << np.uint32(1)) | np.uint32(word > threshold))
            words[j] = np.uint16(word)
        pairs = found & ~1
        for j in range(0, pairs, 2):
            changed[0, places[j]] += np.uint32(1)
            delta[0, words[j]] += np.uint32(1)
            changed[1, places[j + 1]] += np.uint32(1)
            delta[1, words[j + 1]] += np.uint32(1)
        if pairs < found:
            changed[0, places[pairs]] += np.uint32(1)
            delta[0, words[pairs]] += np.uint32(1)
    return bad


def _measure_words(source: np.ndarray, trained: np.ndarray, threshold: float, same_bits: int | None) -> Coordinates:
    size = source.size
    total = np.zeros(BINS, np.int64)
    changed = np.zeros((BINS, 2), np.int64)
    delta = np.zeros(BINS, np.int64)
    nonfinite = 0
    for start in range(0, size, _FLUSH):
        chunk = slice(start, start + _FLUSH)
        counters = [np.zeros((_LANES, bins), np.uint32) for bins in (BINS, 2 * BINS, BINS)]
        nonfinite += _count_words(source[chunk], trained[chunk], _word(threshold), *counters)
        for sums, lanes in zip((total, changed.reshape(-1), delta), counters, strict=True):
            sums += lanes.sum(axis=0, dtype=np.int64)
    nonfinite += int(total[NONFINITE:].sum())
    if same_bits is None:
        same_bits = size - int(delta.sum())
    if nonfinite:
        return Coordinates(size=size, nonfinite=nonfinite, unchanged_bits=same_bits)

    changed[0, 0] -= delta[0]  # +0 against -0: the words differ, the values do not
    nonzero_histogram = changed.sum(axis=1)
    nonzero = int(nonzero_histogram.sum())
    delta[0] = size - nonzero
    at_most = np.cumsum(delta)
    finite = slice(0, NONFINITE + 1)  # Δ of two finite weights may overflow to Inf
    squares = word_values(np.arange(NONFINITE + 1)).astype(np.float64) ** 2
    occupied = np.flatnonzero(delta[finite])
    energies = delta[occupied] * squares[occupied]
    from_top = np.concatenate(([0.0], np.cumsum(energies[::-1])))[::-1]  # energy of the bins from here up
    above = size - at_most[occupied]  # coordinates with larger |Δ|
    top_energy = {}
    for key, share in TOP_SHARES.items():
        k = ceil_share(share, size)
        edge = int(np.argmax(above < k))  # `above` falls along `occupied`: the first bin that is not out entirely
        top_energy[key] = float(from_top[edge + 1] + (k - above[edge]) * squares[occupied[edge]])
    weights = np.flatnonzero(total)
    return Coordinates(
        size=size,
        nonfinite=0,
        unchanged_bits=same_bits,
        unchanged=size - nonzero,
        visible=int(changed[:, 1].sum()),
        nonzero=nonzero,
        sparsity_at={
            key: int(at_most[_word(round_threshold(tau, "bf16", "BF16"))]) for key, tau in SPARSITY_THRESHOLDS.items()
        },
        relative_sparse=size - nonzero,  # a step is at least 2^-8 of the larger weight, so only Δ = 0 is under η
        source_energy=float(total[weights] @ squares[weights]),
        delta_energy=float(from_top[0]),
        top_energy=top_energy,
        total_histogram=total,
        visible_histogram=np.ascontiguousarray(changed[:, 1]),
        nonzero_histogram=nonzero_histogram,
    )


def _word(threshold: float) -> int:
    """The largest word whose value is ≤ `threshold` (non-negative)."""
    return int(np.float32(threshold).view(np.uint32)) >> 16


# --- float32, float64: histograms of the upper bits, and a second look at the bins where a quantile falls -------------

_COUNTERS = types.int64[::1]


@njit(**KERNEL)
def _bin(magnitude):  # type: ignore[no-untyped-def]
    return np.int64((np.float32(magnitude).view(np.uint32) >> np.uint32(16)) & np.uint32(0x7FFF))


def _signature(values: types.Type, scalar: types.Type) -> types.Type:
    return types.void(values, values, types.Array(scalar, 1, "C"), _COUNTERS, _COUNTERS, _COUNTERS, types.float64[::1])


@njit([_signature(SINGLES, types.float32), _signature(DOUBLES, types.float64)], **KERNEL)
def _count_floats(source, trained, thresholds, counts, total, changed, energy):  # type: ignore[no-untyped-def]
    """Counters of one pass. `thresholds`: τ, then those of the table. `counts`: for each threshold the number with
    |Δ| ≤ it, then relative_sparse, nonfinite. `total` by |W|; `changed`: 4 columns a bin (visible and nonzero by |W|,
    number by |Δ|); `energy`: Δ² by |Δ|, then the source's energy in the last place.
    """
    block = 1024
    deltas = np.empty(block, source.dtype)
    tau, t0, t1, t2, t3, t4 = thresholds
    eta = RELATIVE_SHARE
    source_energy = 0.0
    for start in range(0, source.size, block):
        stop = min(start + block, source.size)
        for i in range(start, stop):  # no table look-ups in here: this loop becomes vector instructions
            before, after = abs(source[i]), abs(trained[i])
            delta = abs(trained[i] - source[i])
            deltas[i - start] = delta
            counts[0] += delta <= tau
            counts[1] += delta <= t0
            counts[2] += delta <= t1
            counts[3] += delta <= t2
            counts[4] += delta <= t3
            counts[5] += delta <= t4
            counts[6] += np.float64(delta) <= eta * np.float64(max(before, after))
            counts[7] += not ((before < np.inf) & (after < np.inf))
        for i in range(start, stop):
            weight, delta = abs(source[i]), deltas[i - start]
            bin_w = _bin(weight)
            total[bin_w] += 1
            source_energy += np.float64(weight) * np.float64(weight)
            if delta != 0:
                bin_d = _bin(delta)
                changed[4 * bin_w] += delta > tau
                changed[4 * bin_w + 1] += 1
                changed[4 * bin_d + 2] += 1
                energy[bin_d] += np.float64(delta) * np.float64(delta)
    energy[energy.size - 1] = source_energy


_SLOTS = types.Array(types.boolean, 1, "C")
_FLAGS = types.uint8[::1]


def _gather_signature(values: types.Type, scalar: types.Type) -> types.Type:
    out = types.Array(scalar, 1, "C")
    return types.void(values, values, types.float64, _SLOTS, _SLOTS, out, _FLAGS, out)


@njit([_gather_signature(SINGLES, types.float32), _gather_signature(DOUBLES, types.float64)], **KERNEL)
def _gather_edges(source, trained, threshold, want_w, want_d, weights, flags, deltas):  # type: ignore[no-untyped-def]
    """Collect |W| (with flags: 1 nonzero, 2 visible) and |Δ| of the coordinates that fall in wanted bins."""
    n_w = n_d = 0
    for i in range(source.size):
        weight, delta = abs(source[i]), abs(trained[i] - source[i])
        if want_w[_bin(weight)]:
            weights[n_w] = weight
            flags[n_w] = np.uint8(delta != 0) | (np.uint8(delta > threshold) << np.uint8(1))
            n_w += 1
        if delta != 0 and want_d[_bin(delta)]:
            deltas[n_d] = delta
            n_d += 1


def _measure_floats(
    source: np.ndarray, trained: np.ndarray, threshold: float, same_bits: int, ratios: Sequence[float]
) -> Coordinates:
    size, dtype = source.size, source.dtype
    stored = "F64" if dtype == np.float64 else "F32"
    table = [round_threshold(tau, "stored", stored) for tau in SPARSITY_THRESHOLDS.values()]
    counts, total, changed = np.zeros(8, np.int64), np.zeros(BINS, np.int64), np.zeros(4 * BINS, np.int64)
    energy = np.zeros(BINS + 1)
    _count_floats(source, trained, np.array([threshold, *table], dtype), counts, total, changed, energy)
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
    low = {ratio: (k := ceil_share(ratio, size), int(np.searchsorted(before, k) - 1)) for ratio in ratios}
    want_w, want_d = np.zeros(BINS, bool), np.zeros(BINS, bool)
    want_w[[edge for k, edge in low.values() if k]] = True
    want_d[[edge for k, edge in top.values() if above[edge] + delta[edge] > k]] = True
    weights, deltas = np.empty(int(total[want_w].sum()), dtype), np.empty(int(delta[want_d].sum()), dtype)
    flags = np.empty(weights.size, np.uint8)
    if weights.size or deltas.size:
        _gather_edges(source, trained, threshold, want_w, want_d, weights, flags, deltas)
    weight_bins, delta_bins = _bins(weights), _bins(deltas)

    top_energy = {}
    for key, (k, edge) in top.items():
        part = float(energy[edge])
        if want_d[edge]:
            inside, take = deltas[delta_bins == edge], int(k - above[edge])
            inside = np.partition(inside, inside.size - take)[inside.size - take :].astype(np.float64)
            part = float(inside @ inside)
        top_energy[key] = float(energy[edge + 1 :].sum()) + part
    low_magnitude = {}
    for ratio, (k, edge) in low.items():
        here, take = weight_bins == edge, int(k - before[edge])
        low_magnitude[ratio] = (
            float(visible_histogram[:edge].sum()) + _smallest(weights[here], take, flags[here] & 2 != 0),
            float(nonzero_histogram[:edge].sum()) + _smallest(weights[here], take, flags[here] & 1 != 0),
        )
    nonzero = int(nonzero_histogram.sum())
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
        total_histogram=total,
        visible_histogram=visible_histogram,
        nonzero_histogram=nonzero_histogram,
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
