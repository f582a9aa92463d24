"""Compiled loops of `coordinates` over bf16 words: the one pass, and what is read off its histograms.

Arrays are flat and contiguous; counters are int64 and are added to. Nothing here checks sizes: `coordinates` does.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from deltalens.metrics.values import DOUBLES, KERNEL, WORDS, narrow_single, widen_word

__all__ = [
    "BINS",
    "COUNTERS",
    "NONFINITE",
    "RELATIVE_SHARE",
    "count_words",
    "inside_smallest",
    "read_off",
    "split_changed",
]

BINS = 32768  # magnitudes of a 16-bit word
NONFINITE = 0x7F80  # words from here on are Inf and NaN
RELATIVE_SHARE = 1e-3  # η of `relative_sparsity`

COUNTERS = types.int64[::1]


@njit([types.int64(WORDS, WORDS, types.uint32, COUNTERS, COUNTERS, COUNTERS)], **KERNEL)
def count_words(source, trained, threshold, total_sum, changed_sum, delta_sum):  # type: ignore[no-untyped-def]
    """Add |W| to `total_sum`, the changed |W| to `changed_sum` (twice the word, plus 1 if visible), |Δ| to `delta_sum`.

    Only coordinates whose words differ enter the last two. Returns the number whose trained word alone is non-finite.
    At most 2³⁰ elements a call: the counters of the loop are half as wide, so that more of them stay in the cache.
    """
    total, changed, delta = np.zeros(BINS, np.uint32), np.zeros(2 * BINS, np.uint32), np.zeros(BINS, np.uint32)
    block = 1024
    before, after = np.empty(block, np.uint16), np.empty(block, np.uint16)
    places, words = np.empty(block, np.uint16), np.empty(block, np.uint16)
    bad = np.int64(0)
    for start in range(0, source.size, block):
        # Slices and an unsigned `found`: numba then need not ask at every access whether the index is negative.
        left, right = source[start : start + block], trained[start : start + block]
        found = np.uint64(0)
        # Gather the changed pairs without branching: at middling densities a branch is mispredicted a third of the
        # time, which costs more than all the rest.
        for i in range(left.size):
            word, trained_word = left[i], right[i]
            total[word & np.uint16(0x7FFF)] += np.uint32(1)
            before[found], after[found] = word, trained_word
            found += np.uint64(word != trained_word)
        for j in range(found):  # vector instructions: no table is touched
            step = narrow_single(abs(np.float32(widen_word(after[j]) - widen_word(before[j]))))
            magnitude = np.uint32(before[j] & np.uint16(0x7FFF))
            trained_magnitude = np.uint32(after[j] & np.uint16(0x7FFF))
            bad += np.int64((trained_magnitude >= np.uint32(NONFINITE)) & (magnitude < np.uint32(NONFINITE)))
            places[j] = np.uint16(np.uint32(magnitude << np.uint32(1)) | np.uint32(step > threshold))
            words[j] = np.uint16(step)
        for j in range(found):
            changed[places[j]] += np.uint32(1)
            delta[words[j]] += np.uint32(1)
    for i in range(BINS):
        total_sum[i] += np.int64(total[i])
        delta_sum[i] += np.int64(delta[i])
    for i in range(2 * BINS):
        changed_sum[i] += np.int64(changed[i])
    return bad


@njit([types.UniTuple(types.int64, 4)(COUNTERS, COUNTERS, COUNTERS, COUNTERS, COUNTERS)], **KERNEL)
def split_changed(total, changed, delta, visible, nonzero):  # type: ignore[no-untyped-def]
    """Split `changed` into the histograms `visible` and `nonzero`.

    Returns their sums, the number whose words differ, and the number whose source word is non-finite.
    """
    differ = np.int64(0)
    for i in range(BINS):
        differ += delta[i]
    changed[0] -= delta[0]  # +0 against -0: the words differ, the values do not
    seen = moved = bad = np.int64(0)
    for i in range(BINS):
        visible[i] = changed[2 * i + 1]
        nonzero[i] = changed[2 * i] + changed[2 * i + 1]
        seen += visible[i]
        moved += nonzero[i]
    for i in range(NONFINITE, BINS):
        bad += total[i]
    return seen, moved, differ, bad


@njit(
    [types.UniTuple(types.float64, 2)(COUNTERS, COUNTERS, DOUBLES, COUNTERS, types.float64[::1], COUNTERS, COUNTERS)],
    **KERNEL,
)
def read_off(total, delta, squares, ranks, top_energy, lasts, below):  # type: ignore[no-untyped-def]
    """‖W‖², ‖Δ‖² from the histograms, smallest terms first.

    Into `top_energy` goes the energy of the `ranks` largest |Δ|, into `below` how many |Δ| lie up to the word `lasts`.
    """
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
    for j in range(lasts.size):
        for i in range(lasts[j] + 1):
            below[j] += delta[i]
    return source_energy, delta_energy


@njit([types.UniTuple(types.float64, 2)(COUNTERS, COUNTERS, COUNTERS, types.int64)], **KERNEL)
def inside_smallest(total, visible, nonzero, wanted):  # type: ignore[no-untyped-def]
    """How many of the `visible` and of the `nonzero` lie among the `wanted` smallest weights, ties by their share."""
    seen = moved = np.int64(0)
    for i in range(BINS):
        if total[i] > wanted:
            share = wanted / total[i]
            return seen + share * visible[i], moved + share * nonzero[i]
        wanted -= total[i]
        seen += visible[i]
        moved += nonzero[i]
    return np.float64(seen), np.float64(moved)
