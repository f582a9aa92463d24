"""Principal masks on a device, in float64 throughout; `metrics.members` is their twin.

A first pass makes a histogram of |R| by the leading 16 bits of the float64, which says in which bin the threshold lies;
a second pass adds up what is surely inside and keeps the few entries near the threshold, among which it is then found
exactly. Nothing is sorted and R is never held as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import torch

from deltalens.accelerator.device import differences
from deltalens.metrics.blocks import is_tall
from deltalens.metrics.masks import TIE_TOLERANCE, MaskSpec, MaskSums
from deltalens.metrics.rounding_null import RoundingNull
from deltalens.metrics.spectrum import Factorisation
from deltalens.metrics.values import ceil_share

__all__ = ["entry_codes_on", "entry_weights", "mask_sums_on"]

MASK_ELEMENTS = 1 << 24  # entries of the reconstruction at a time
MAGNITUDE = 0x7FFFFFFFFFFFFFFF
KEY_SHIFT = 47  # float64 bits → 11 exponent and 5 mantissa bits
KEYS = 1 << 16


def entry_weights(nulls: Sequence[RoundingNull | None]) -> np.ndarray:
    """What an entry of each code of `entry_codes_on` adds: visible, nonzero, P(visible | w), P(nonzero | w)."""
    words = 32768
    weights = np.zeros((3, words, 4))
    weights[2, :, 0] = 1.0
    weights[1:, :, 1] = 1.0
    for i, null in enumerate(nulls):
        if null is not None:
            weights[:, :, 2 + i] = null.table()
    return weights.reshape(3 * words, 4)


def entry_codes_on(before: torch.Tensor, after: torch.Tensor, tau: float) -> torch.Tensor:
    """A code for each entry of a part of the longer side: its source word, and whether and how far it moved.

    Args:
        before, after: prepared values on a device, one shape.
        tau: the rounded threshold.

    Returns:
        int32, flat: the 15-bit word of |w| (upper 16 bits of the float32), plus 32768 where Δ ≠ 0, plus another
        32768 where |Δ| > τ.
    """
    before, after = before.reshape(-1), after.reshape(-1)
    step = differences(before, after).double().abs()
    words = (before.float().view(torch.int32) >> 16) & 0x7FFF
    return words + ((step > 0).to(torch.int32) + (step > tau).to(torch.int32)) * 32768


def mask_sums_on(
    device: str,
    factors: Factorisation,
    shape: tuple[int, int],
    weights: np.ndarray,
    masks: Sequence[MaskSpec],
    codes: Callable[[slice], torch.Tensor],
) -> list[MaskSums]:
    """Sums of per-entry weights over each principal mask.

    Args:
        device: where R is formed.
        factors: of the source; at least as many vectors as the largest rank.
        shape: (m, n) of the source.
        weights: (number of codes, c) float64, what an entry of each code adds to each of the c sums.
        masks: the masks, by ascending rank.
        codes: gives the codes of a part of the longer side, flat, in the matrix's own orientation.
    """
    step = max(1, MASK_ELEMENTS // min(shape))
    parts = [slice(start, min(start + step, max(shape))) for start in range(0, max(shape), step)]
    long, short = (torch.from_numpy(x).to(device) for x in (factors.long, factors.short))
    values = torch.from_numpy(factors.values).to(device)
    accumulators = []
    for mask in masks:
        k = mask.rank
        scaled, transposed = long[:, :k] * values[:k], short[:, :k].T
        table, largest = np.zeros(KEYS, np.int64), 0.0
        for part in parts:
            size = (scaled[part] @ transposed).abs_()
            bits = size.view(torch.int64) & MAGNITUDE
            table += torch.bincount(bits.reshape(-1) >> KEY_SHIFT, minlength=KEYS).cpu().numpy()
            largest = max(largest, float(size.max()))
        accumulators.append(_Accumulator(table, largest, ceil_share(mask.share, prod(shape)), weights))
    for part in parts:
        piece = codes(part)
        if not is_tall(shape):  # codes come in the matrix's own orientation, blocks with the longer side as rows
            piece = piece.reshape(shape[0], -1).T.reshape(-1)
        for mask, accumulator in zip(masks, accumulators, strict=True):
            k = mask.rank
            size = ((long[part, :k] * values[:k]) @ short[:, :k].T).abs_().reshape(-1)
            _add(accumulator, size, piece)
    return [accumulator.result() for accumulator in accumulators]


def _add(accumulator: _Accumulator, size: torch.Tensor, codes: torch.Tensor) -> None:
    """Entries above the threshold's bin are counted by code: their sums are exact whatever the order."""
    inside = size > accumulator.high
    near = (size >= accumulator.low) & ~inside
    counts = torch.bincount(codes[inside], minlength=len(accumulator.weights)).cpu().numpy()
    accumulator.inside += int(counts.sum())
    accumulator.sums += (counts[:, None] * accumulator.weights).sum(axis=0)
    accumulator.near_values.append(_on_host(size[near]))
    accumulator.near_codes.append(_on_host(codes[near]))


def _on_host(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.cpu().numpy())


class _Accumulator:
    """One mask: what lies above the threshold's bin is added up, what lies near it is kept."""

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
