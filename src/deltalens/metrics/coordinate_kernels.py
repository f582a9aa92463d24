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
    "MOVES",
    "NONFINITE",
    "RELATIVE_SHARE",
    "count_words",
    "inside_smallest",
    "read_off",
]

BINS = 32768  # magnitudes of a 16-bit word
NONFINITE = 0x7F80  # words from here on are Inf and NaN
RELATIVE_SHARE = 1e-3  # η of `relative_sparsity`
REACH = 7  # steps a word may move, up or down, to be counted in the table of moves
FAR = 2 * REACH + 1  # that table's column for the words that moved further
MOVES = FAR + 1  # its columns: a cache line
BLOCK = 512
SCANNED = 128  # words at a time that are looked at for any coordinate

COUNTERS = types.int64[::1]


@njit(**KERNEL)
def _sum(part):  # type: ignore[no-untyped-def]
    total = np.int64(0)
    for i in range(part.size):  # vector instructions
        total += part[i]
    return total


@njit(**KERNEL)
def _step(before, after):  # type: ignore[no-untyped-def]
    """|Δ| of two words as a word."""
    return narrow_single(abs(np.float32(widen_word(after) - widen_word(before))))


@njit(**KERNEL)
def _count_gathered(before, after, threshold, weights, steps, changed, delta):  # type: ignore[no-untyped-def]
    bad = np.int64(0)
    for j in range(before.size):  # vector instructions
        step = _step(before[j], after[j])
        magnitude = np.uint32(before[j] & np.uint16(0x7FFF))
        trained_magnitude = np.uint32(after[j] & np.uint16(0x7FFF))
        bad += np.int64((trained_magnitude >= np.uint32(NONFINITE)) & (magnitude < np.uint32(NONFINITE)))
        weights[j] = np.uint16(np.uint32(magnitude << np.uint32(1)) | np.uint32(step > threshold))
        steps[j] = np.uint16(step)
    for j in range(before.size):
        changed[weights[j]] += 1
        delta[steps[j]] += 1
    return bad


@njit(**KERNEL)
def _empty_moves(moves, lowest, highest, threshold, total, changed, delta):  # type: ignore[no-untyped-def]
    """Add what `moves` holds for the words from `lowest` to `highest` to the other tables, and zero it."""
    bad = np.int64(0)
    pairs = moves.view(np.uint64)
    half = MOVES // 2
    for word in range(lowest, highest + 1):
        row = pairs[half * word : half * word + half]
        held = np.uint64(0)
        for i in range(half):
            held |= row[i]
        if not held:
            continue
        for move in range(MOVES):
            count = np.int64(moves[MOVES * word + move])
            if not count:
                continue
            moves[MOVES * word + move] = 0
            total[word] += count
            if move in (REACH, FAR):
                continue
            trained = word + move - REACH
            if trained < 0 or trained >= NONFINITE:  # below ±0 comes the largest word of the other sign, a NaN
                bad += count * (word < NONFINITE)
                trained &= BINS - 1
            step = _step(np.uint16(word), np.uint16(trained))
            changed[2 * word + np.int64(step > threshold)] += count
            delta[np.int64(step)] += count
    return bad


@njit(**KERNEL)
def _range(words):  # type: ignore[no-untyped-def]
    """The smallest and the largest magnitude that is not 0; the smallest is above the largest where all are 0."""
    low, high = np.uint16(0xFFFF), np.uint16(0)
    for i in range(words.size):  # vector instructions, twice as wide as in a loop that widens words too
        magnitude = np.uint16(words[i] & np.uint16(0x7FFF))
        low = min(low, np.uint16(magnitude - np.uint16(1)))  # of 0: the largest word, which no minimum takes
        high = max(high, magnitude)
    return np.int64(low) + 1, np.int64(high)


@njit([types.int64(WORDS, WORDS, types.uint32, types.uint32[::1], COUNTERS, COUNTERS, COUNTERS)], **KERNEL)
def count_words(source, trained, threshold, moves, total, changed, delta):  # type: ignore[no-untyped-def]
    """Add |W| to `total`, the changed |W| to `changed` (twice the word, plus 1 if visible), |Δ| to `delta`.

    Only coordinates whose words differ enter the last two. Returns the number whose trained word alone is non-finite.
    `moves` (uint32[BINS · MOVES]) is scratch, zero before and after. At most 2³⁰ elements a call.

    Most changed words are a few steps from where they were, so one table of the word and of how many steps it moved
    holds nearly all that is asked, for one increment an element; what it stands for is worked out once a cell. The
    rest are gathered, without branches on single elements: those would be mispredicted, at more than all else costs.
    """
    places, far = np.empty(BLOCK, np.uint32), np.zeros(BLOCK, np.uint8)
    eights = far.view(np.uint64)
    occupied = np.empty(eights.size, np.uint16)
    before, after = np.empty(2 * BLOCK, np.uint16), np.empty(2 * BLOCK, np.uint16)
    weights, steps = np.empty(2 * BLOCK, np.uint16), np.empty(2 * BLOCK, np.uint16)
    lowest, highest = np.int64(BINS), np.int64(0)
    bad = np.int64(0)
    gathered = np.uint64(0)
    for start in range(0, source.size, BLOCK):
        # Slices and unsigned counts: numba then need not ask at every access whether the index is negative.
        left, right = source[start : start + BLOCK], trained[start : start + BLOCK]
        for i in range(left.size):  # vector instructions: no table is touched
            word = left[i]
            move = np.uint32(np.uint16(right[i] - word + np.uint16(REACH)))
            magnitude = np.uint32(word & np.uint16(0x7FFF))
            far[i] = np.uint8(move >= np.uint32(FAR))
            places[i] = np.uint32(magnitude * np.uint32(MOVES)) | min(move, np.uint32(FAR))
        low, high = _range(left)
        lowest, highest = min(lowest, low), max(highest, high)
        for i in range(left.size):
            moves[places[i]] += np.uint32(1)
        far[left.size :] = 0
        some = np.uint64(0)
        for j in range(eights.size):
            occupied[some] = j
            some += np.uint64(eights[j] != np.uint64(0))
        for j in range(some):
            first = np.uint64(8) * np.uint64(occupied[j])
            for i in range(first, first + np.uint64(8)):
                before[gathered], after[gathered] = left[i], right[i]
                gathered += np.uint64(far[i])
        if gathered >= np.uint64(BLOCK):
            bad += _count_gathered(before[:gathered], after[:gathered], threshold, weights, steps, changed, delta)
            gathered = np.uint64(0)
    bad += _count_gathered(before[:gathered], after[:gathered], threshold, weights, steps, changed, delta)
    # Most tensors hold a few zeros, and nothing near them: half of the table would be looked through for one row.
    bad += _empty_moves(moves, 0, 0, threshold, total, changed, delta)
    bad += _empty_moves(moves, lowest, highest, threshold, total, changed, delta)
    return bad


@njit(
    [
        types.Tuple((COUNTERS, COUNTERS, COUNTERS, COUNTERS, types.int64, types.int64, types.float64, types.float64))(
            COUNTERS, COUNTERS, COUNTERS, DOUBLES, COUNTERS, COUNTERS, types.float64[::1], COUNTERS
        )
    ],
    **KERNEL,
)
def read_off(total, changed, delta, squares, ranks, lasts, top_energy, below):  # type: ignore[no-untyped-def]
    """Everything that the tables of `count_words` tell; they are zero afterwards.

    Into `top_energy` (zero before) goes the energy of the `ranks` largest |Δ|, into `below` how many |Δ| that are not
    0 lie up to the word `lasts`.

    Returns the words that have weights, ascending, how many weights, visible and nonzero updates each has, the number
    of weights whose words differ, that of non-finite source words, and ‖W‖², ‖Δ‖², smallest terms first.
    """
    changed[0] -= delta[0]  # +0 against -0: the words differ, the values do not
    bad = np.int64(0)
    source_energy = delta_energy = 0.0
    occupied, some = np.empty(BINS // SCANNED, np.int64), np.int64(0)
    for start in range(0, BINS, SCANNED):
        occupied[some] = start
        some += _sum(total[start : start + SCANNED]) != 0
    words, weights = np.empty(some * SCANNED, np.int64), np.empty(some * SCANNED, np.int64)
    visible, nonzero = np.empty(some * SCANNED, np.int64), np.empty(some * SCANNED, np.int64)
    found = np.int64(0)
    for start in occupied[:some]:
        for i in range(start, start + SCANNED):
            if i >= NONFINITE:
                bad += total[i]
            else:
                source_energy += total[i] * squares[i]
            words[found], weights[found] = i, total[i]
            visible[found], nonzero[found] = changed[2 * i + 1], changed[2 * i] + changed[2 * i + 1]
            found += total[i] != 0
            total[i] = changed[2 * i] = changed[2 * i + 1] = 0
    differ = delta[0]
    delta[0] = 0
    some = np.int64(0)
    for start in range(0, BINS, SCANNED):
        if not _sum(delta[start : start + SCANNED]):
            continue
        occupied[some] = start
        some += 1
        for i in range(start, start + SCANNED):
            if not delta[i]:
                continue
            differ += delta[i]
            if i <= NONFINITE:  # the last: Δ of two finite weights may overflow to Inf
                delta_energy += delta[i] * squares[i]
            for j in range(lasts.size):
                if i <= lasts[j]:
                    below[j] += delta[i]
    wanted = ranks.copy()
    for start in occupied[:some][::-1]:
        for i in range(start + SCANNED - 1, start - 1, -1):
            if not delta[i]:
                continue
            if i <= NONFINITE:
                for j in range(wanted.size):
                    take = min(wanted[j], delta[i])
                    if take:
                        top_energy[j] += take * squares[i]
                        wanted[j] -= take
            delta[i] = 0
    by_word = words[:found], weights[:found], visible[:found], nonzero[:found]
    return *by_word, differ, bad, source_energy, delta_energy


@njit([types.UniTuple(types.float64, 2)(COUNTERS, COUNTERS, COUNTERS, types.int64)], **KERNEL)
def inside_smallest(weights, visible, nonzero, wanted):  # type: ignore[no-untyped-def]
    """How many of the `visible` and of the `nonzero` lie among the `wanted` smallest `weights`, all by ascending word.

    Ties at the edge count by the share of them that fits.
    """
    seen = moved = np.int64(0)
    for i in range(weights.size):
        held = weights[i]
        if held > wanted:
            share = wanted / held
            return seen + share * visible[i], moved + share * nonzero[i]
        wanted -= held
        seen += visible[i]
        moved += nonzero[i]
    return np.float64(seen), np.float64(moved)
