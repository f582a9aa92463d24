"""What the masks of a matrix are made of (METRICS.md, "Masks against the source"), and the packed masks of updates."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from deltalens.metrics.values import KERNEL, WORDS, delta_float64, narrow_single, widen_word

__all__ = [
    "TIE_TOLERANCE",
    "MaskSpec",
    "MaskSums",
    "count_bits",
    "magnitude_words",
    "pack_updates",
]

TIE_TOLERANCE = 1e-9  # of the largest |R|: entries this near to the threshold count as tied
BYTES = numba.types.Array(numba.uint8, 1, "C", readonly=True)
PACK_CHUNK = 1 << 16  # elements at a time: their flags stay in the cache; a multiple of 8


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """A principal mask: rank of the reconstruction and share of the entries it holds."""

    rank: int
    share: float


@dataclass(frozen=True, slots=True)
class MaskSums:
    """Sums over one mask, with entries tied at the threshold counted by the share of them that fits.

    Attributes:
        entries: how many entries the mask holds, ⌈α·mn⌉.
        sums: (c,) float64, one sum for each of the caller's entry weights.
    """

    entries: int
    sums: np.ndarray


def magnitude_words(values: np.ndarray) -> np.ndarray:
    """The 15-bit word of |w| of prepared values (flat): the upper 16 bits of the float32."""
    words = values if values.dtype == np.uint16 else (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return words & np.uint16(0x7FFF)


def pack_updates(before: np.ndarray, after: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """|Δ| > τ and |Δ| > 0 of two prepared sides, packed as `numpy.packbits` does: uint8[⌈N/8⌉] each."""
    before, after = before.reshape(-1), after.reshape(-1)
    packed = np.empty((2, -(-before.size // 8)), np.uint8)
    flags = np.empty((2, min(PACK_CHUNK, before.size)), np.uint8)
    delta = np.empty(0 if before.dtype == after.dtype == np.uint16 else flags.shape[1])
    for start in range(0, before.size, PACK_CHUNK):
        stop = min(start + PACK_CHUNK, before.size)
        ours, theirs = before[start:stop], after[start:stop]
        if delta.size:
            piece = delta[: stop - start]
            delta_float64(ours, theirs, piece)
            np.abs(piece, out=piece)
            kinds: list[np.ndarray] = [piece > tau, piece > 0]
        else:
            kinds = [flags[0, : stop - start], flags[1, : stop - start]]
            _flag_words(ours, theirs, np.float32(tau), *kinds)
        for out, kind in zip(packed, kinds, strict=True):
            out[start // 8 : -(-stop // 8)] = np.packbits(kind)
    return packed[0], packed[1]


def count_bits(*packed: np.ndarray) -> int:
    """How many bits are set in all of these packed masks (uint8, contiguous, of one size, at least one)."""
    first, second = packed[0], packed[-1]
    for mask in packed[1:-1]:
        first = first & mask
    return int(_count_shared(first, second))


@numba.njit([numba.int64(BYTES, BYTES)], **KERNEL)
def _count_shared(a, b):  # type: ignore[no-untyped-def]
    whole = a.size & ~7
    longs, others = a[:whole].view(np.uint64), b[:whole].view(np.uint64)
    total = np.int64(0)
    for i in range(longs.size):
        x = longs[i] & others[i]
        x -= (x >> np.uint64(1)) & np.uint64(0x5555555555555555)
        x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
        x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
        total += np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))
    for i in range(whole, a.size):
        x = np.uint64(a[i] & b[i])
        while x:
            x &= x - np.uint64(1)
            total += 1
    return total


@numba.njit([numba.void(WORDS, WORDS, numba.float32, numba.uint8[::1], numba.uint8[::1])], **KERNEL)
def _flag_words(source, trained, tau, visible, nonzero):  # type: ignore[no-untyped-def]
    for i in range(source.size):
        difference = np.float32(widen_word(trained[i]) - widen_word(source[i]))
        size = abs(widen_word(narrow_single(difference)))
        visible[i] = size > tau
        nonzero[i] = size > 0
