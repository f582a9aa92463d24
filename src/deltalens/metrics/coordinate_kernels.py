"""Compiled loops of `coordinates`: one pass over bf16 words, one over floats, and the float pass's second look.

Arrays are flat and contiguous; counters are int64 and are added to. Nothing here checks sizes: `coordinates` does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types

from deltalens.metrics.values import DOUBLES, KERNEL, SINGLES, WORDS, narrow_single, widen_word

__all__ = ["BINS", "NONFINITE", "RELATIVE_SHARE", "count_floats", "count_words", "gather_edges", "read_off"]

BINS = 32768  # magnitudes of a 16-bit word
NONFINITE = 0x7F80  # words from here on are Inf and NaN
RELATIVE_SHARE = 1e-3  # η of `relative_sparsity`

_COUNTERS = types.int64[::1]


@njit([types.int64(WORDS, WORDS, types.uint32, _COUNTERS, _COUNTERS, _COUNTERS)], **KERNEL)
def count_words(source, trained, threshold, total_sum, changed_sum, delta_sum):  # type: ignore[no-untyped-def]
    """Add |W| to `total_sum`, the changed |W| to `changed_sum` (twice the word, plus 1 if visible), |Δ| to `delta_sum`.

    Only coordinates whose words differ enter the last two. Returns the number whose trained word alone is non-finite.
    At most 2³⁰ elements a call: the counters of the loop are half as wide, so that more of them stay in the cache.
    """
    # Two tables side by side: an element equal to its neighbour need not wait for that one's store.
    total, delta = np.zeros((2, BINS), np.uint32), np.zeros((2, BINS), np.uint32)
    changed = np.zeros((2, 2 * BINS), np.uint32)
    block = 1024
    before, after = np.empty(block + 2, np.uint16), np.empty(block + 2, np.uint16)
    places, words = np.empty(block + 2, np.uint16), np.empty(block + 2, np.uint16)
    bad = np.int64(0)
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
            bad += np.int64((trained_magnitude >= np.uint32(NONFINITE)) & (magnitude < np.uint32(NONFINITE)))
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
    for i in range(BINS):
        total_sum[i] += np.int64(total[0, i]) + np.int64(total[1, i])
        delta_sum[i] += np.int64(delta[0, i]) + np.int64(delta[1, i])
    for i in range(2 * BINS):
        changed_sum[i] += np.int64(changed[0, i]) + np.int64(changed[1, i])
    return bad


@njit([types.UniTuple(types.float64, 2)(_COUNTERS, _COUNTERS, DOUBLES, _COUNTERS, types.float64[::1])], **KERNEL)
def read_off(total, delta, squares, ranks, top_energy):  # type: ignore[no-untyped-def]
    """‖W‖², ‖Δ‖², and in `top_energy` that of the `ranks` largest |Δ|, from the histograms. Smallest terms first."""
    source_energy = delta_energy = 0.0
    for i in range(NONFINITE):
        source_energy += total[i] * squares[i]
    for i in range(NONFINITE + 1):  # the last: Δ of two finite weights may overflow to Inf
        if delta[i]:
            delta_energy += delta[i] * squares[i]
    for j in range(ranks.size):
        wanted = ranks[j]
        for i in range(NONFINITE, -1, -1):
            take = min(wanted, delta[i])
            if take:
                top_energy[j] += take * squares[i]
                wanted -= take
                if not wanted:
                    break
    return source_energy, delta_energy


@njit(**KERNEL)
def _bin(magnitude):  # type: ignore[no-untyped-def]
    return np.int64((np.float32(magnitude).view(np.uint32) >> np.uint32(16)) & np.uint32(0x7FFF))


def _signature(values: Any, scalar: Any) -> Any:
    return types.void(values, values, types.Array(scalar, 1, "C"), _COUNTERS, _COUNTERS, _COUNTERS, types.float64[::1])


@njit([_signature(SINGLES, types.float32), _signature(DOUBLES, types.float64)], **KERNEL)
def count_floats(source, trained, thresholds, counts, total, changed, energy):  # type: ignore[no-untyped-def]
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


def _gather_signature(values: Any, scalar: Any) -> Any:
    out = types.Array(scalar, 1, "C")
    return types.void(values, values, types.float64, _SLOTS, _SLOTS, out, _FLAGS, out)


@njit([_gather_signature(SINGLES, types.float32), _gather_signature(DOUBLES, types.float64)], **KERNEL)
def gather_edges(source, trained, threshold, want_w, want_d, weights, flags, deltas):  # type: ignore[no-untyped-def]
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
