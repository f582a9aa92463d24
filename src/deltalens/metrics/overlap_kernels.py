"""Compiled loops of `overlap`: differences of a band, histograms of |W|, and the joint counts of two runs.

Arrays are flat and contiguous; counters and sums are added to. Nothing here checks sizes: `overlap` does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types

from deltalens.metrics.values import DOUBLES, KERNEL, SINGLES, WORDS, narrow_single, widen_word

__all__ = ["count_magnitudes", "join_runs", "mark_run", "subtract", "word_magnitudes"]

_COUNTERS = types.int64[::1]
# Sums may be taken in any order, so that they become vector instructions; the counts are integers, and exact.
_SUMMING: dict[str, Any] = {**KERNEL, "fastmath": {"reassoc", "contract"}}


@njit([types.void(WORDS, WORDS, types.float32[::1])], **KERNEL)
def _subtract_words(source, trained, out):  # type: ignore[no-untyped-def]
    for i in range(source.size):
        difference = np.float32(widen_word(trained[i]) - widen_word(source[i]))
        out[i] = widen_word(narrow_single(difference))


def subtract(source: np.ndarray, trained: np.ndarray, out: np.ndarray) -> None:
    """Write trained − source into `out` (float32, or float64 where a side is), in the compare dtype's arithmetic."""
    if source.dtype == np.uint16:
        _subtract_words(source, trained, out)
    else:
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf are counted
            np.subtract(trained, source, out=out)


@njit([types.void(WORDS, _COUNTERS)], **KERNEL)
def word_magnitudes(source, counts):  # type: ignore[no-untyped-def]
    """Add the words without their signs to `counts` [32768]."""
    # Two tables: an element equal to its neighbour need not wait for that one's store.
    tables = np.zeros((2, counts.size), np.uint32)
    even = source.size & ~1
    for i in range(0, even, 2):
        tables[0, source[i] & 0x7FFF] += np.uint32(1)
        tables[1, source[i + 1] & 0x7FFF] += np.uint32(1)
    if even < source.size:
        tables[0, source[even] & 0x7FFF] += np.uint32(1)
    for word in range(counts.size):
        counts[word] += np.int64(tables[0, word]) + np.int64(tables[1, word])


@njit([types.void(SINGLES, _COUNTERS), types.void(DOUBLES, _COUNTERS)], **KERNEL)
def count_magnitudes(source, counts):  # type: ignore[no-untyped-def]
    """Add the upper 16 bits of the float32 magnitudes to `counts` [32768]."""
    for i in range(source.size):
        counts[(np.float32(source[i]).view(np.uint32) >> np.uint32(16)) & np.uint32(0x7FFF)] += 1


@njit(**KERNEL)
def _ones(word):  # type: ignore[no-untyped-def]
    """How many bits of a uint64 are set; LLVM knows these lines as its one instruction."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


def _run_signature(values: Any) -> Any:
    return types.float64(values, types.float64, types.uint64[:, ::1], _COUNTERS)


@njit([_run_signature(SINGLES), _run_signature(DOUBLES)], **_SUMMING)
def mark_run(delta, tau, marks, counts):  # type: ignore[no-untyped-def]
    """Mark where one run's Δ, of whole words of 64, is visible, nonzero and negative: a bit each in `marks` (3, words).

    Adds the number of visible and nonzero Δ to `counts` [2]; returns Σ Δ² of the band, NaN or Inf where a Δ is.
    """
    energy = 0.0
    for word in range(delta.size >> 6):
        visible = nonzero = negative = np.uint64(0)
        for bit in range(64):
            x = np.float64(delta[(word << 6) + bit])
            mark = np.uint64(1) << np.uint64(bit)
            visible |= mark if abs(x) > tau else np.uint64(0)
            nonzero |= mark if x != 0.0 else np.uint64(0)
            negative |= mark if x < 0.0 else np.uint64(0)
            energy += x * x
        marks[0, word], marks[1, word], marks[2, word] = visible, nonzero, negative
        counts[0] += _ones(visible)
        counts[1] += _ones(nonzero)
    return energy


@njit(**KERNEL)
def _count_pair(left, right, counts):  # type: ignore[no-untyped-def]
    visible = visible_same = nonzero = nonzero_same = np.int64(0)
    for i in range(left.shape[1]):
        same = ~(left[2, i] ^ right[2, i])
        seen = left[0, i] & right[0, i]
        changed = left[1, i] & right[1, i]
        visible += _ones(seen)
        visible_same += _ones(seen & same)
        nonzero += _ones(changed)
        nonzero_same += _ones(changed & same)
    counts[0] += visible
    counts[1] += visible_same
    counts[2] += nonzero
    counts[3] += nonzero_same


@njit(**_SUMMING)
def _sum_pair(left, right, tau_left, tau_right, sums):  # type: ignore[no-untyped-def]
    dot = a1 = b1 = a2 = b2 = ab = 0.0
    for i in range(left.size):
        x, y = np.float64(left[i]), np.float64(right[i])
        dot += x * y
        x, y = abs(x), abs(y)
        seen = (x > tau_left) & (y > tau_right)
        x = x if seen else np.float64(0.0)
        y = y if seen else np.float64(0.0)
        a1 += x
        b1 += y
        a2 += x * x
        b2 += y * y
        ab += x * y
    sums[0] += dot
    sums[1] += a1
    sums[2] += b1
    sums[3] += a2
    sums[4] += b2
    sums[5] += ab


def _join_signature(values: Any) -> Any:
    marks = types.Array(types.uint64, 3, "C", readonly=True)
    return types.void(types.Array(values.dtype, 2, "C"), DOUBLES, marks, types.int64[:, ::1], types.float64[:, ::1])


@njit([_join_signature(SINGLES), _join_signature(DOUBLES)], **KERNEL)
def join_runs(deltas, taus, marks, counts, sums):  # type: ignore[no-untyped-def]
    """Joint counts and sums of every pair of runs, in the order of `itertools.combinations`.

    `deltas` (runs, size), `taus` (runs,), `marks` (runs, 3, words) from `mark_run`. Adds to `counts` (pairs, 4): both
    visible, of these with one sign, both nonzero, of these with one sign; to `sums` (pairs, 6): Σ ΔAΔB over all, then
    over the coordinates that both changed visibly Σ|ΔA|, Σ|ΔB|, ΣΔA², ΣΔB², Σ|ΔA||ΔB|.
    """
    pair = 0
    for i in range(deltas.shape[0]):
        for j in range(i + 1, deltas.shape[0]):
            _count_pair(marks[i], marks[j], counts[pair])
            _sum_pair(deltas[i], deltas[j], taus[i], taus[j], sums[pair])
            pair += 1
