"""Copies of an update that keep its values and lose how they lie against the source (METRICS.md, "Random values").

Two ways. `sign` flips every entry's sign at random and moves nothing: sizes stay where they are. `exponent` shuffles
entries among the coordinates whose source weight has the same exponent: these have one spacing in a floating-point
format, so that every copy lies on the grid that the update itself lay on (free shuffling would not).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numba
import numpy as np

from deltalens.metrics.blocks import Blocks, delta_blocks, value_blocks
from deltalens.metrics.values import delta_float64

__all__ = ["Permuted", "permuted_updates", "shuffle_within_exponents", "source_exponents", "z_score"]

CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Permuted:
    """A permuted update and the weights it leads to, as float64 blocks with the longer side as rows.

    Attributes:
        delta: Δ'.
        trained: W + Δ'.
    """

    delta: Blocks
    trained: Blocks


def permuted_updates(
    before: np.ndarray, after: np.ndarray, kind: Literal["sign", "exponent"], draws: int, seed: int
) -> Iterator[Permuted]:
    """Seeded copies of Δ = after − before. A copy is good until the next one.

    Args:
        before, after: (m, n), prepared by `metrics.values.prepare`.
        kind: what is permuted; see above.
        draws: how many copies.
        seed: of all of them.
    """
    exponents, values = None, np.empty(0)
    if kind == "exponent":
        exponents = source_exponents(before.reshape(-1))
        # In the narrowest of float32 and float64 that holds Δ exactly.
        values = np.empty(before.size, np.result_type(before.dtype, after.dtype, np.float32))
    for draw in range(draws):
        key = (seed, draw, *before.shape)
        if exponents is None:
            delta: Blocks = partial(_flipped, before, after, key)
        else:
            _differences(before.reshape(-1), after.reshape(-1), values)
            shuffle_within_exponents(values, exponents, np.random.default_rng(key))
            delta = partial(value_blocks, values.reshape(before.shape))
        yield Permuted(delta, partial(_sum, partial(value_blocks, before), delta))


def _flipped(before: np.ndarray, after: np.ndarray, key: Sequence[int]) -> Iterator[tuple[slice, np.ndarray]]:
    for part, block in delta_blocks(before, after):
        rng = np.random.default_rng([*key, part.start])  # a second pass over the blocks sees the same signs
        signs = rng.integers(0, 2, block.shape, np.int8) * np.int8(2) - np.int8(1)
        yield part, block * signs


def _sum(first: Blocks, second: Blocks) -> Iterator[tuple[slice, np.ndarray]]:
    for (part, a), (_, b) in zip(first(), second(), strict=True):
        yield part, a + b


def _differences(before: np.ndarray, after: np.ndarray, out: np.ndarray) -> None:
    """Δ, flat."""
    piece = np.empty(min(CHUNK, before.size))
    for start in range(0, before.size, CHUNK):
        stop = min(start + CHUNK, before.size)
        delta_float64(before[start:stop], after[start:stop], piece[: stop - start])
        out[start:stop] = piece[: stop - start]


def source_exponents(values: np.ndarray) -> np.ndarray:
    """The exponent field (uint8, uint16 of float64, flat) of prepared values: bf16 words, float32 or float64."""
    bits, shift, field = {
        "uint16": (np.uint16, 7, np.uint8),
        "float32": (np.uint32, 23, np.uint8),
        "float64": (np.uint64, 52, np.uint16),
    }[values.dtype.name]
    words, out = values.view(bits), np.empty(values.size, field)
    mask = bits(0x7FF if field is np.uint16 else 0xFF)
    for start in range(0, values.size, CHUNK):
        out[start : start + CHUNK] = (words[start : start + CHUNK] >> bits(shift)) & mask
    return out


def shuffle_within_exponents(delta: np.ndarray, exponents: np.ndarray, rng: np.random.Generator) -> None:
    """Shuffle `delta` (flat) in place among the coordinates of each value of `exponents` (uint8 or 16, as long)."""
    counts = np.zeros(int(exponents.max(initial=0)) + 1, np.int64)
    for start in range(0, exponents.size, CHUNK):  # NumPy counts int64s, into which it would cast all at once
        counts += np.bincount(exponents[start : start + CHUNK], minlength=counts.size)
    ends = np.cumsum(counts)
    starts = np.concatenate(([0], ends[:-1]))
    gathered = np.empty_like(delta)
    _gather(delta, exponents, starts.copy(), gathered)
    for start, end in zip(starts, ends, strict=True):
        rng.shuffle(gathered[start:end])
    _scatter(gathered, exponents, starts, delta)


@numba.njit(nogil=True, cache=True)
def _gather(delta, exponents, place, out):  # type: ignore[no-untyped-def]
    for i in range(delta.size):
        e = exponents[i]
        out[place[e]] = delta[i]
        place[e] += 1


@numba.njit(nogil=True, cache=True)
def _scatter(gathered, exponents, place, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        e = exponents[i]
        out[i] = gathered[place[e]]
        place[e] += 1


def z_score(seen: float | None, values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and standard deviation of the permuted values, and how many deviations `seen` lies above the mean.

    With K values the deviation is known to about 1/√(2(K − 1)) of itself, and so is the score; both are None where
    there is one value, the score also where all are alike.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    deviation = float(np.std(values, ddof=1))
    # A deviation at the level of rounding says that the permutation does not move this number at all.
    moved = seen is not None and deviation > 1e-12 * max(abs(mean), 1e-300)
    return mean, deviation, (seen - mean) / deviation if seen is not None and moved else None
