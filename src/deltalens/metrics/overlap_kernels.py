"""Compiled loops of `overlap`: differences of a band, histograms of |W|, and the joint counts of two runs.

Arrays are flat and contiguous; counters and sums are added to. Nothing here checks sizes: `overlap` does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types

from deltalens.metrics.values import DOUBLES, KERNEL, SINGLES, WORDS, narrow_single, widen_word

__all__ = ["count_magnitudes", "count_pair", "count_run", "subtract", "word_magnitudes"]

_COUNTERS = types.int64[::1]
_SUMS = types.float64[::1]
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


def _run_signature(values: Any) -> Any:
    return types.float64(values, types.float64, _COUNTERS)


@njit([_run_signature(SINGLES), _run_signature(DOUBLES)], **_SUMMING)
def count_run(delta, tau, counts):  # type: ignore[no-untyped-def]
    """Add one run's visible, nonzero and non-finite Δ to `counts` [3]; returns Σ Δ² of the band."""
    visible = nonzero = bad = np.int64(0)
    energy = 0.0
    for i in range(delta.size):
        magnitude = np.float64(abs(delta[i]))
        visible += magnitude > tau
        nonzero += magnitude != 0.0
        bad += not (magnitude < np.inf)
        energy += magnitude * magnitude
    counts[0] += visible
    counts[1] += nonzero
    counts[2] += bad
    return energy


def _pair_signature(values: Any) -> Any:
    return types.void(values, values, types.float64, types.float64, _COUNTERS, _SUMS)


@njit([_pair_signature(SINGLES), _pair_signature(DOUBLES)], **_SUMMING)
def count_pair(left, right, tau_left, tau_right, counts, sums):  # type: ignore[no-untyped-def]
    """Joint counts and sums of two runs' Δ.

    `counts` [4]: both visible, of these with one sign, both nonzero, of these with one sign. `sums` [6]: Σ ΔAΔB over
    all, then over the coordinates that both changed visibly Σ|ΔA|, Σ|ΔB|, ΣΔA², ΣΔB², Σ|ΔA||ΔB|.
    """
    visible = visible_same = nonzero = nonzero_same = np.int64(0)
    dot = a1 = b1 = a2 = b2 = ab = 0.0
    for i in range(left.size):
        x, y = np.float64(left[i]), np.float64(right[i])
        seen = (abs(x) > tau_left) & (abs(y) > tau_right)
        same = (x > 0.0) == (y > 0.0)
        changed = (x != 0.0) & (y != 0.0)
        visible += seen
        visible_same += seen & same
        nonzero += changed
        nonzero_same += changed & same
        dot += x * y
        if seen:
            x, y = abs(x), abs(y)
            a1 += x
            b1 += y
            a2 += x * x
            b2 += y * y
            ab += x * y
    counts[0] += visible
    counts[1] += visible_same
    counts[2] += nonzero
    counts[3] += nonzero_same
    sums[0] += dot
    sums[1] += a1
    sums[2] += b1
    sums[3] += a2
    sums[4] += b2
    sums[5] += ab
