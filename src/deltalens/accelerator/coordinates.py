"""The coordinate pass on a device: the twins of `metrics.coordinate_kernels`, histograms by `torch.bincount`.

What is read off the histograms is the processor's own code: counts are equal, energies to the order of the sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from deltalens.accelerator.device import differences, enough_memory, to_device
from deltalens.metrics.coordinates import (
    BINS,
    RELATIVE_SHARE,
    Coordinates,
    WordTables,
    count_same_bits,
    from_floats,
    from_words,
)

__all__ = ["measure_coordinates_on"]

CHUNK = 1 << 24  # elements at a time: the temporaries of a chunk take some 500 MB
NONFINITE = 0x7F80


def measure_coordinates_on(
    device: str,
    source: np.ndarray,
    trained: np.ndarray,
    *,
    threshold: float,
    stored: tuple[np.ndarray, np.ndarray] | None = None,
    ratios: Sequence[float] = (),
) -> Coordinates:
    """`metrics.coordinates.measure_coordinates` on a torch device; the same arguments and result.

    Raises:
        DeltalensError: the device is out of memory.
    """
    assert source.size == trained.size, (source.size, trained.size)
    if not source.size:
        return Coordinates(size=0, nonfinite=0, unchanged_bits=0)
    same_bits = None
    if stored is not None and not all(map(np.may_share_memory, (source, trained), stored)):
        same_bits = count_same_bits(*stored, size=source.size)
    if source.dtype != np.uint16 and same_bits is None:
        same_bits = count_same_bits(source.view(np.uint8), trained.view(np.uint8), size=source.size)
    if source.dtype != trained.dtype:
        source, trained = source.astype(np.float64, copy=False), trained.astype(np.float64, copy=False)
    with enough_memory(device, source.shape):
        sides = _Sides(to_device(source, device), to_device(trained, device))
        if source.dtype == np.uint16:
            return from_words(source.size, threshold, same_bits, sides.count_words)
        assert same_bits is not None
        return from_floats(
            source.size, source.dtype, threshold, same_bits, ratios, sides.count_floats, sides.gather_edges
        )


class _Sides:
    """Both sides of a tensor on a device, flat. The methods add to NumPy tables as the compiled kernels do."""

    def __init__(self, source: torch.Tensor, trained: torch.Tensor) -> None:
        self.source, self.trained = source, trained

    def _chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return zip(self.source.split(CHUNK), self.trained.split(CHUNK), strict=True)

    def count_words(self, threshold: int, tables: WordTables) -> int:
        bad = 0
        for source, trained in self._chunks():
            weight = _magnitude(source)
            tables.total += _count(weight, BINS)
            differ = source.view(torch.int16) != trained.view(torch.int16)
            weight, source, trained = weight[differ], source[differ], trained[differ]
            bad += int(((_magnitude(trained) >= NONFINITE) & (weight < NONFINITE)).sum())
            step = _magnitude(differences(source, trained))
            tables.changed += _count(2 * weight + (step > threshold), 2 * BINS)
            tables.delta += _count(step, BINS)
        return bad

    def count_floats(
        self, thresholds: np.ndarray, counts: np.ndarray, total: np.ndarray, changed: np.ndarray, energy: np.ndarray
    ) -> None:
        for source, trained in self._chunks():
            step, before, after = (trained - source).abs(), source.abs(), trained.abs()
            for i, tau in enumerate(thresholds.tolist()):
                counts[i] += int((step <= tau).sum())
            small = step.double() <= RELATIVE_SHARE * torch.maximum(before, after).double()
            counts[6] += int(small.sum())
            counts[7] += int((~((before < torch.inf) & (after < torch.inf))).sum())
            weight = _bin(before)
            total += _count(weight, BINS)
            energy[-1] += float((before.double() ** 2).sum())
            moved = step != 0
            weight, step = weight[moved], step[moved]
            bins = _bin(step)
            changed[0::4] += _count(weight[step > thresholds[0].item()], BINS)
            changed[1::4] += _count(weight, BINS)
            changed[2::4] += _count(bins, BINS)
            energy[:-1] += torch.bincount(bins, weights=step.double() ** 2, minlength=BINS).cpu().numpy()

    def gather_edges(
        self,
        threshold: float,
        want_w: np.ndarray,
        want_d: np.ndarray,
        weights: np.ndarray,
        flags: np.ndarray,
        deltas: np.ndarray,
    ) -> None:
        wanted_w, wanted_d = (torch.from_numpy(want).to(self.source.device) for want in (want_w, want_d))
        n_w = n_d = 0
        for source, trained in self._chunks():
            weight, step = source.abs(), (trained - source).abs()
            near = wanted_w[_bin(weight)]
            found = weight[near].cpu().numpy()
            flag = (step[near] != 0).to(torch.uint8) + 2 * (step[near] > threshold).to(torch.uint8)
            weights[n_w : n_w + found.size] = found
            flags[n_w : n_w + found.size] = flag.cpu().numpy()
            n_w += found.size
            found = step[(step != 0) & wanted_d[_bin(step)]].cpu().numpy()
            deltas[n_d : n_d + found.size] = found
            n_d += found.size


def _magnitude(values: torch.Tensor) -> torch.Tensor:
    """bfloat16 → int32 words without the sign."""
    return values.view(torch.int16).to(torch.int32) & 0x7FFF


def _bin(magnitudes: torch.Tensor) -> torch.Tensor:
    return (magnitudes.float().view(torch.int32) >> 16) & 0x7FFF


def _count(keys: torch.Tensor, size: int) -> np.ndarray:
    return np.asarray(torch.bincount(keys, minlength=size).cpu().numpy())
