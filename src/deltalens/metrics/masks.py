"""The principal mask and the share of updates inside it (METRICS.md, "Masks against the source").

The mask holds the ⌈α·mn⌉ entries of largest magnitude of the rank-k reconstruction R of the source. R is formed
block by block in float64. A first pass makes a histogram of |R| by the leading 16 bits of the float64, which says
in which bin the threshold lies; a second pass adds up what is surely inside and keeps the few entries near the
threshold, among which it is then found exactly. Nothing is sorted and R is never held as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numba
import numpy as np

from deltalens.metrics.blocks import block_slices, cut, is_tall
from deltalens.metrics.spectrum import Factorisation
from deltalens.metrics.values import ceil_share, delta_float64, narrow_single, widen_word

__all__ = [
    "KEYS",
    "KEY_SHIFT",
    "Accumulator",
    "MaskSpec",
    "MaskSums",
    "PrincipalMembers",
    "entry_codes",
    "principal_mask_sums",
]

TIE_TOLERANCE = 1e-9  # of the largest |R|: entries this near to the threshold count as tied
KEY_SHIFT = 47  # float64 bits → 11 exponent and 5 mantissa bits
KEYS = 1 << 16


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


def principal_mask_sums(
    factors: Factorisation,
    shape: tuple[int, int],
    weights: np.ndarray,
    masks: Sequence[MaskSpec],
    codes: Callable[[slice], np.ndarray],
) -> list[MaskSums]:
    """Sums of per-entry weights over each principal mask.

    Args:
        factors: of the source; at least as many vectors as the largest rank.
        shape: (m, n) of the source.
        weights: (number of codes, c) float64, what an entry of each code adds to each of the c sums.
        masks: the masks, by ascending rank.
        codes: gives the integer codes of a part of the longer side, flat, in the matrix's own orientation.
    """
    accumulators, held = _thresholds(factors, shape, weights, masks)
    for part in block_slices(shape):
        piece = codes(part)
        again = held or _reconstructions(factors, shape, part, masks)
        for accumulator, block in zip(accumulators, again, strict=True):
            accumulator.add(block.reshape(-1), piece)
    return [accumulator.result() for accumulator in accumulators]


def _thresholds(
    factors: Factorisation, shape: tuple[int, int], weights: np.ndarray, masks: Sequence[MaskSpec]
) -> tuple[list[Accumulator], list[np.ndarray] | None]:
    """The first pass; then R of every rank where it was small enough to be kept."""
    slices = list(block_slices(shape))
    tables = [np.zeros(KEYS, np.int64) for _ in masks]
    largest = [0.0] * len(masks)
    held: list[np.ndarray] | None = None
    for part in slices:
        blocks: Iterable[np.ndarray] = _reconstructions(factors, shape, part, masks)
        if len(slices) == 1:  # it fits the cache: keeping R of every rank is cheaper than a second product
            blocks = held = [block.copy() for block in blocks]
        for i, block in enumerate(blocks):
            largest[i] = max(largest[i], _histogram(block.reshape(-1), tables[i]))
    accumulators = [
        Accumulator(table, top, ceil_share(mask.share, prod(shape)), weights)
        for mask, table, top in zip(masks, tables, largest, strict=True)
    ]
    return accumulators, held


class PrincipalMembers:
    """Which entries the principal masks of one source hold, kept for several updates of it.

    A byte an entry with up to five masks: for each mask a digit to base 3, 0 outside, 1 inside, 2 tied.
    """

    def __init__(self, factors: Factorisation, shape: tuple[int, int], masks: Sequence[MaskSpec]) -> None:
        accumulators, held = _thresholds(factors, shape, np.zeros((1, 1)), masks)
        self.masks = tuple(masks)
        self.entries = [accumulator.entries for accumulator in accumulators]
        kind = np.uint8 if len(masks) <= 5 else np.uint32
        digits = [kind(3**i) for i in range(len(masks))]
        self.parts: list[tuple[slice, np.ndarray]] = []
        near: list[list[np.ndarray]] = [[] for _ in masks]  # places of what lies near a threshold, a part each
        for part in block_slices(shape):
            state = np.zeros((part.stop - part.start) * min(shape), kind)
            blocks = held or _reconstructions(factors, shape, part, masks)
            for block, accumulator, digit, places in zip(blocks, accumulators, digits, near, strict=True):
                flat = block.reshape(-1)
                here, inside = _sort_out(flat, accumulator.low, accumulator.high, digit, state)
                accumulator.inside += inside
                accumulator.near_values.append(np.abs(flat[here]))
                places.append(here)
            self.parts.append((part, state))
        states = np.arange(3 ** len(masks))
        self.shares = np.zeros((states.size, len(masks)))  # of an entry of each state that counts as inside
        for i, (accumulator, places) in enumerate(zip(accumulators, near, strict=True)):
            low, high, share = accumulator.edges()
            self.shares[:, i] = np.array([0.0, 1.0, share])[states // 3**i % 3]
            for (_, state), here, values in zip(self.parts, places, accumulator.near_values, strict=True):
                state[here[values > high]] += digits[i]
                state[here[(values <= high) & (values >= low)]] += kind(2) * digits[i]
        self._words: np.ndarray | None = None

    def sums(
        self, before: np.ndarray, after: np.ndarray, tau: float, probabilities: tuple[np.ndarray, np.ndarray]
    ) -> list[MaskSums]:
        """For each mask the visible and the nonzero updates in it, and Σ P over it for both nulls, (4,) float64.

        Args:
            before, after: (m, n) prepared values; `before` is the source that the masks are of.
            tau: the rounded threshold.
            probabilities: P(visible | word) and P(nonzero | word), float64[32768] each.
        """
        if self._words is None:
            self._words = np.zeros((len(self.masks), 32768))
            for part, state in self.parts:
                _add_words(state, _magnitude_words(cut(before, part).reshape(-1)), self.shares, self._words)
        moved = np.zeros((self.shares.shape[0], 2), np.int64)
        for part, state in self.parts:
            ours, theirs = cut(before, part).reshape(-1), cut(after, part).reshape(-1)
            (_count_words if ours.dtype == np.uint16 else _count_floats)(state, ours, theirs, tau, moved)
        counts = self.shares.T @ moved
        expected = self._words @ np.stack(probabilities, axis=1)
        rows = np.concatenate([counts, expected], axis=1)
        return [MaskSums(entries, row) for entries, row in zip(self.entries, rows, strict=True)]


def _reconstructions(
    factors: Factorisation, shape: tuple[int, int], part: slice, masks: Sequence[MaskSpec]
) -> Iterator[np.ndarray]:
    """The rank-k reconstruction of one block for each mask, in the matrix's own orientation.

    One buffer serves all: each yield adds the directions since the last rank.
    """
    done = 0
    total: np.ndarray | None = None
    for mask in masks:
        if mask.rank > done:
            span = slice(done, mask.rank)
            long = factors.long[part, span] * factors.values[span]
            short = factors.short[:, span]
            step = long @ short.T if is_tall(shape) else short @ long.T
            total = step if total is None else np.add(total, step, out=total)
            done = mask.rank
        assert total is not None, "a mask has rank at least 1"
        yield total


class Accumulator:
    """Second pass for one mask: adds what lies above the threshold's bin, keeps what lies near it."""

    def __init__(self, table: np.ndarray, largest: float, entries: int, weights: np.ndarray) -> None:
        self.entries = entries
        self.weights = weights
        self.tolerance = TIE_TOLERANCE * largest
        above = np.cumsum(table[::-1])[::-1]  # entries in this bin or higher
        key = int(np.flatnonzero(above >= entries)[-1])
        edges = np.array([key, key + 1], np.uint64) << np.uint64(KEY_SHIFT)
        low, high = edges.view(np.float64)
        self.low = float(low) - 2 * self.tolerance
        self.high = float(high) + 2 * self.tolerance if np.isfinite(high) else float("inf")
        self.inside = 0
        self.sums = np.zeros(weights.shape[1])
        self.near_values: list[np.ndarray] = []
        self.near_codes: list[np.ndarray] = []

    def add(self, block: np.ndarray, codes: np.ndarray) -> None:
        values, near, inside = _classify(block, codes, self.low, self.high, self.weights, self.sums)
        self.inside += inside
        self.near_values.append(values)
        self.near_codes.append(near)

    def edges(self) -> tuple[float, float, float]:
        """Entries above the second value are inside, those from the first on are tied; the share of these that fits."""
        values = np.concatenate(self.near_values)
        missing = self.entries - self.inside  # how many of the kept entries still fit
        threshold = float(np.partition(values, values.size - missing)[values.size - missing])
        low, high = threshold - self.tolerance, threshold + self.tolerance
        above = values > high
        tied = ~above & (values >= low)
        return low, high, (missing - int(above.sum())) / int(tied.sum())

    def result(self) -> MaskSums:
        values, codes = np.concatenate(self.near_values), np.concatenate(self.near_codes)
        low, high, share = self.edges()
        above = values > high
        tied = ~above & (values >= low)
        added = self.weights[codes[above]].sum(axis=0) + share * self.weights[codes[tied]].sum(axis=0)
        return MaskSums(self.entries, self.sums + added)


def entry_codes(source: np.ndarray, trained: np.ndarray, part: slice, tau: float) -> np.ndarray:
    """A code for each entry of a part of the longer side: its source word, and whether and how far it moved.

    Args:
        source, trained: (m, n) prepared values.
        part: slice of the longer side.
        tau: the rounded threshold.

    Returns:
        int32, flat: the 15-bit word of |w| (upper 16 bits of the float32), plus 32768 where Δ ≠ 0, plus another
        32768 where |Δ| > τ.
    """
    before, after = cut(source, part).reshape(-1), cut(trained, part).reshape(-1)
    delta = np.empty(before.size)
    delta_float64(before, after, delta)
    out = np.empty(before.size, np.int32)
    _codes(_magnitude_words(before), delta, tau, out)
    return out


def _magnitude_words(values: np.ndarray) -> np.ndarray:
    """The 15-bit word of |w| of prepared values (flat): the upper 16 bits of the float32."""
    words = values if values.dtype == np.uint16 else (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return words & np.uint16(0x7FFF)


@numba.njit(nogil=True, cache=True)
def _codes(words, delta, tau, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        size = abs(delta[i])
        moved = (1 if size > 0 else 0) + (1 if size > tau else 0)
        out[i] = np.int32(words[i] & 0x7FFF) + np.int32(moved) * np.int32(32768)


@numba.njit("float64(float64[::1], int64[::1])", nogil=True, cache=True)
def _histogram(block, table):  # type: ignore[no-untyped-def]
    bits = block.view(np.uint64)
    largest = np.uint64(0)
    mask = np.uint64(0x7FFFFFFFFFFFFFFF)
    for i in range(bits.size):
        magnitude = bits[i] & mask
        table[magnitude >> np.uint64(KEY_SHIFT)] += 1
        largest = max(largest, magnitude)
    box = np.empty(1, np.uint64)
    box[0] = largest
    return box.view(np.float64)[0]


@numba.njit(nogil=True, cache=True)
def _classify(block, codes, low, high, weights, sums):  # type: ignore[no-untyped-def]
    values = np.empty(1024)
    near = np.empty(1024, codes.dtype)
    kept = 0
    inside = 0
    columns = sums.size
    for i in range(block.size):
        magnitude = abs(block[i])
        if magnitude < low:
            continue
        if magnitude > high:
            inside += 1
            for c in range(columns):
                sums[c] += weights[codes[i], c]
        else:
            if kept == values.size:
                larger = np.empty(2 * kept)
                larger[:kept] = values
                values = larger
                larger_near = np.empty(2 * kept, codes.dtype)
                larger_near[:kept] = near
                near = larger_near
            values[kept] = magnitude
            near[kept] = codes[i]
            kept += 1
    return values[:kept].copy(), near[:kept].copy(), inside


@numba.njit(nogil=True, cache=True)
def _sort_out(block, low, high, digit, state):  # type: ignore[no-untyped-def]
    """Adds `digit` to the state of what is above `high`; the places from `low` to there, and how many were above."""
    near = np.empty(1024, np.int64)
    kept = 0
    inside = 0
    for i in range(block.size):
        magnitude = abs(block[i])
        if magnitude > high:
            state[i] += digit
            inside += 1
        elif magnitude >= low:
            if kept == near.size:
                larger = np.empty(2 * kept, np.int64)
                larger[:kept] = near
                near = larger
            near[kept] = i
            kept += 1
    return near[:kept].copy(), inside


@numba.njit(nogil=True, cache=True)
def _add_words(state, words, shares, sums):  # type: ignore[no-untyped-def]
    for i in range(state.size):
        held = state[i]
        if held:
            for mask in range(sums.shape[0]):
                sums[mask, words[i]] += shares[held, mask]


@numba.njit(nogil=True, cache=True)
def _count_words(state, before, after, tau, counts):  # type: ignore[no-untyped-def]
    for i in range(state.size):
        held = state[i]
        if held and before[i] != after[i]:
            size = abs(widen_word(narrow_single(np.float32(widen_word(after[i]) - widen_word(before[i])))))
            counts[held, 0] += size > tau
            counts[held, 1] += size > 0


@numba.njit(nogil=True, cache=True)
def _count_floats(state, before, after, tau, counts):  # type: ignore[no-untyped-def]
    for i in range(state.size):
        held = state[i]
        if held:
            size = abs(after[i] - before[i])
            counts[held, 0] += size > tau
            counts[held, 1] += size > 0
