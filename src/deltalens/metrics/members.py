"""Which entries the principal masks of one source hold (METRICS.md, "Masks against the source").

The mask holds the ⌈α·mn⌉ entries of largest magnitude of the rank-k reconstruction R of the source. R is formed block
by block in float32, which is enough to place all but a few: what lies so near to the threshold that float32's error,
which is bounded, could move it across is computed again in float64. Membership is that of R in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numba
import numpy as np

from deltalens.metrics.blocks import is_tall
from deltalens.metrics.masks import TIE_TOLERANCE, MaskSpec, MaskSums, count_bits, magnitude_words
from deltalens.metrics.spectrum import Factorisation
from deltalens.metrics.values import KERNEL, WORDS, ceil_share

__all__ = ["WORD_COUNT", "PrincipalMembers", "find_members"]

BLOCK_ELEMENTS = 1 << 18  # 1 MB of R: its loops find it in the cache
SAMPLED_ROWS = 64, 1024  # of R, at least and at most, for where a threshold lies
SAMPLED_ELEMENTS = 1 << 17  # of these rows; of a large matrix more
SAMPLED_EVERY = 5  # entry of these
CONFIDENCE = 3.0  # standard errors of the sample on either side
TRIES = 3  # at a wider and wider stretch, before every entry is looked at
CHUNK = 4096  # entries whose places are listed at once
NEAR_ELEMENTS = 1 << 17  # of the factors' rows that are gathered at once, to compute entries again in float64
WORD_COUNT = 32768


@dataclass(frozen=True, slots=True)
class PrincipalMembers:
    """Membership of every entry, packed, for any number of updates of one source.

    Attributes:
        masks: what was asked for.
        entries: how many entries each holds, ⌈α·mn⌉.
        inside: uint8[⌈mn/8⌉] each, bits as `numpy.packbits` sets them, rows of the source after one another.
        tied: int64 each, the places of entries tied at the threshold, which are not in `inside`.
        shares: the share of the tied entries that fits.
        words: int64, the words |w| of the source that any mask holds.
        histograms: (masks, words) float64, how many entries of each word each mask holds.
    """

    masks: tuple[MaskSpec, ...]
    entries: list[int]
    inside: list[np.ndarray]
    tied: list[np.ndarray]
    shares: list[float]
    words: np.ndarray
    histograms: np.ndarray

    def sums(self, updates: Sequence[np.ndarray], probabilities: Sequence[np.ndarray] = ()) -> list[MaskSums]:
        """For each mask how many of each packed update it holds, then Σ P(|w|) over it for each of `probabilities`.

        Args:
            updates: packed as `metrics.masks.pack_updates` does.
            probabilities: float64[32768] each, by word.
        """
        expected = [self.histograms @ probability[self.words] for probability in probabilities]
        out = []
        for i, (entries, inside, tied) in enumerate(zip(self.entries, self.inside, self.tied, strict=True)):
            counts = [
                count_bits(inside, update) + self.shares[i] * int((update[tied >> 3] >> (7 - (tied & 7)) & 1).sum())
                for update in updates
            ]
            out.append(MaskSums(entries, np.array([*counts, *(total[i] for total in expected)])))
        return out


def find_members(factors: Factorisation, before: np.ndarray, masks: Sequence[MaskSpec]) -> PrincipalMembers:
    """What the principal masks of a source hold.

    Args:
        factors: of the source; at least as many vectors as the largest rank.
        before: (m, n) prepared values of the source.
        masks: by ascending rank.
    """
    entries = [ceil_share(mask.share, prod(before.shape)) for mask in masks]
    reconstruction = _Reconstruction(factors, before.shape, masks)
    flat = before.reshape(-1)
    for attempt in range(TRIES + 1):
        width = CONFIDENCE * 4**attempt if attempt < TRIES else None
        passes = [_Pass(before.size, low, high) for low, high in reconstruction.stretches(entries, width)]
        for start, blocks in reconstruction.blocks():
            words = magnitude_words(flat[start : start + reconstruction.block])
            for one, block in zip(passes, blocks, strict=True):
                one.add(block.reshape(-1), start, words)
        edges = [reconstruction.edges(i, one, entries[i]) for i, one in enumerate(passes)]
        if None not in edges:
            break
    all_tied, shares = [], []
    histograms = np.zeros((len(masks), WORD_COUNT))
    for one, edge, total in zip(passes, edges, histograms, strict=True):
        assert edge is not None, "looking at every entry finds the threshold"
        above, tied, share = edge
        _include(above, magnitude_words(flat[above]), one.inside, one.words)
        all_tied.append(tied)
        shares.append(share)
        total += one.words
        np.add.at(total, magnitude_words(flat[tied]), share)
    held = np.flatnonzero(histograms.any(axis=0))
    inside = [one.inside for one in passes]
    return PrincipalMembers(tuple(masks), entries, inside, all_tied, shares, held, histograms[:, held])


class _Pass:
    """One mask's pass over R: what is surely inside is marked, what lies in the stretch is kept."""

    def __init__(self, size: int, low: float, high: float) -> None:
        ends = np.array([low, high], np.float32)
        self.low, self.high = ends.tolist()
        self.keys = [int(bits) for bits in ends.view(np.uint32)]  # floats ≥ 0 order as their bits
        self.inside = np.zeros(-(-size // 8), np.uint8)
        self.words = np.zeros(WORD_COUNT, np.int64)
        self.count = 0
        self.largest = 0.0
        self._near: list[tuple[int, np.ndarray, np.ndarray]] = []

    def add(self, block: np.ndarray, start: int, words: np.ndarray) -> None:
        """`block`: flat, of the entries from `start`, which is a multiple of 8; `words` are theirs."""
        flags = np.zeros(block.size, np.uint8)
        places, kept, count, largest = _sort_out(
            block.view(np.uint32), self.keys[0], self.keys[1], words, flags, self.words
        )
        self.inside[start // 8 : start // 8 + -(-block.size // 8)] = np.packbits(flags)
        near = places[:kept]
        self._near.append((start, near.astype(np.int32), np.abs(block[near])))  # in a large matrix these are many
        self.count += count
        self.largest = max(self.largest, float(np.uint32(largest).view(np.float32)))

    def near(self) -> tuple[np.ndarray, np.ndarray]:
        """Places of the entries of the stretch, and their |R|."""
        places = [start + near for start, near, _ in self._near]
        found = np.concatenate(places, dtype=np.int64), np.concatenate([values for _, _, values in self._near])
        self._near = []
        return found


class _Reconstruction:
    """R / σ₁ of each mask's rank, in float32 by blocks of rows, and in float64 where asked."""

    def __init__(self, factors: Factorisation, shape: tuple[int, int], masks: Sequence[MaskSpec]) -> None:
        k = masks[-1].rank
        top = float(factors.values[0])
        scale = factors.values[:k] / top if top > 0 else np.zeros(k)
        self.shape, self.masks, self.scale = shape, masks, scale
        self.block = shape[1] * max(8, BLOCK_ELEMENTS // shape[1] // 8 * 8)  # whole bytes of a packed mask
        long, short = factors.long[:, :k], factors.short[:, :k]
        self.rows, self.columns = (long, short) if is_tall(shape) else (short, long)
        self.single_columns = np.ascontiguousarray(self.columns, dtype=np.float32)
        # |Σ l·s − its float32 value| ≤ (k + a few)·2⁻²⁴·Σ|l·s|, whatever the order of the sum: rounding of both
        # factors, of k products and sums, and of the addition of a step for each rank. Σ|l·s| ≤ ‖l‖·‖s‖.
        norms = [0.0, float(np.sqrt(np.einsum("ik,ik->i", self.single_columns, self.single_columns).max()))]
        for start in range(0, shape[0], CHUNK):
            some = self._single_rows(slice(start, start + CHUNK))
            norms[0] = max(norms[0], float(np.sqrt(np.einsum("ik,ik->i", some, some).max())))
        self.error = 1.02 * (k + len(masks) + 4) * 2.0**-24 * norms[0] * norms[1] + 1e-37

    def _single_rows(self, part: slice | np.ndarray) -> np.ndarray:
        """The factors of some rows, times σ / σ₁; made as they are asked for, as the longer side has many."""
        return np.multiply(self.rows[part], self.scale, dtype=np.float32, casting="same_kind")

    def _of(self, part: slice | np.ndarray) -> Iterator[np.ndarray]:
        """R of each rank for some rows; one buffer serves all."""
        rows, columns = self._single_rows(part), self.single_columns
        done = 0
        total: np.ndarray | None = None
        step: np.ndarray | None = None
        for mask in self.masks:
            if mask.rank > done:
                span = slice(done, mask.rank)
                if total is None:
                    total = rows[:, span] @ columns[:, span].T
                else:
                    step = np.matmul(rows[:, span], columns[:, span].T, out=step)
                    total += step
                done = mask.rank
            assert total is not None, "a mask has rank at least 1"
            yield total

    def blocks(self) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
        """The place of a block's first entry, and R of each rank there."""
        m, n = self.shape
        count = self.block // n
        for row in range(0, m, count):
            yield row * n, self._of(slice(row, min(row + count, m)))

    def stretches(self, entries: Sequence[int], confidence: float | None) -> list[tuple[float, float]]:
        """For each mask a stretch of |R| that holds its threshold, by a sample of rows; all of it without confidence.

        Rows differ more than their entries: the error of a share is that of a mean over rows.
        """
        if confidence is None:
            return [(0.0, np.inf) for _ in entries]
        m, n = self.shape
        count = min(m, max(SAMPLED_ROWS[0], min(max(SAMPLED_ELEMENTS, m * n >> 7) // n, SAMPLED_ROWS[1])))
        rows = np.unique(np.linspace(0, m - 1, count).astype(np.int64))
        out = []
        for wanted, block in zip(entries, self._of(rows), strict=True):
            size = np.abs(block)
            some = size.reshape(-1)[::SAMPLED_EVERY].copy()
            share = wanted / (m * n)
            place = _place(some.size, share)
            some.partition(place)
            guess = some[place]
            spread = float(np.std((size > guess).mean(axis=1))) / rows.size**0.5 + (share / some.size) ** 0.5
            ends = [_place(some.size, share + side * confidence * spread) for side in (1, -1)]
            some.partition(ends)
            margin = 2 * self.error + 4 * TIE_TOLERANCE * float(some[ends[1] :].max())
            low, high = float(some[ends[0]]) - margin, float(some[ends[1]]) + margin
            out.append((max(low, 0.0) if share + confidence * spread < 1 else 0.0, high))
        return out

    def edges(self, i: int, one: _Pass, entries: int) -> tuple[np.ndarray, np.ndarray, float] | None:
        """Which of the entries kept by `one` are inside, which are tied, and the share of these that fits.

        None where the threshold is not in its stretch, or too near to its ends.
        """
        places, values = one.near()
        missing = entries - one.count  # how many of the kept entries still fit
        if not 0 < missing <= places.size:
            return None
        threshold = float(np.partition(values, values.size - missing)[values.size - missing])
        tolerance = TIE_TOLERANCE * max(one.largest, threshold)
        reach = 2 * self.error + tolerance  # the float64 threshold is within one error of this one
        if (one.low > 0 and threshold - reach < one.low) or threshold + reach > one.high:
            return None
        surely = values > threshold + reach
        unsure = ~surely & (values >= threshold - reach)
        critical = places[unsure]
        exact = self.exact(i, critical)
        missing -= int(surely.sum())
        threshold = float(np.partition(exact, exact.size - missing)[exact.size - missing])
        above = exact > threshold + tolerance
        tied = ~above & (exact >= threshold - tolerance)
        share = (missing - int(above.sum())) / int(tied.sum())
        return np.concatenate([places[surely], critical[above]]), critical[tied], share

    def exact(self, i: int, places: np.ndarray) -> np.ndarray:
        """|R| / σ₁ of the i-th mask's rank at flat places, in float64."""
        k, n = self.masks[i].rank, self.shape[1]
        out = np.empty(places.size)
        step = max(1, NEAR_ELEMENTS // k)
        for start in range(0, places.size, step):
            some = places[start : start + step]
            rows, columns = self.rows[some // n, :k], self.columns[some % n, :k]
            out[start : start + some.size] = np.einsum("ek,k,ek->e", rows, self.scale[:k], columns)
        return np.abs(out, out=out)


def _place(size: int, share: float) -> int:
    """Of the value in an ascending sample that `share` of the sample lies at or above."""
    return min(max(size - round(share * size), 0), size - 1)


@numba.njit(
    [
        numba.types.Tuple((numba.int64[::1], numba.int64, numba.int64, numba.uint32))(
            numba.uint32[::1], numba.int64, numba.int64, WORDS, numba.uint8[::1], numba.int64[::1]
        )
    ],
    **KERNEL,
)
def _sort_out(bits, low, high, words, flags, histogram):  # type: ignore[no-untyped-def]
    """Flags and counts what is above `high`, by word; the places from `low` to there, how many these are, how many
    were above, and the largest of all those."""
    least, most = np.uint32(low), np.uint32(high)
    sign = np.uint32(0x7FFFFFFF)
    places = np.empty(CHUNK, np.int32)
    near = np.empty(1024, np.int64)
    kept = 0
    inside = 0
    largest = np.uint32(0)
    for start in range(0, bits.size, CHUNK):
        stop = min(start + CHUNK, bits.size)
        held = 0
        for i in range(start, stop):  # without a branch, which would be mispredicted every few entries
            places[held] = i - start
            held += int(np.uint32(bits[i] & sign) >= least)
        if kept + held > near.size:
            larger = np.empty(max(2 * near.size, kept + held), np.int64)
            larger[:kept] = near[:kept]
            near = larger
        for j in range(held):
            i = start + places[j]
            size = np.uint32(bits[i] & sign)
            largest = max(largest, size)
            above = int(size > most)
            near[kept] = i
            kept += 1 - above
            inside += above
            flags[i] = above
            histogram[words[i]] += above
    return near, kept, inside, largest


@numba.njit([numba.void(numba.int64[::1], WORDS, numba.uint8[::1], numba.int64[::1])], **KERNEL)
def _include(places, words, inside, histogram):  # type: ignore[no-untyped-def]
    """Marks the entries at some places, whose words are given, as inside."""
    for i in range(places.size):
        inside[places[i] >> 3] |= np.uint8(128 >> (places[i] & 7))
        histogram[words[i]] += 1
