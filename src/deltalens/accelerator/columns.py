"""The spectral columns of one matrix on a device, each the twin of a function in `metrics`.

The whole matrix is on the device in float64, so that nothing is cut into blocks but the reconstructions of the
principal masks. Singular values come from the Gram matrix wherever it resolves them, also of nearly square
matrices: on a GPU an SVD costs many times an eigenvalue decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from deltalens.accelerator.device import delta_matrix, differences, enough_memory, to_device, value_matrix
from deltalens.analysis.spectral import SpectralColumns
from deltalens.metrics.alignment import DeltaPass
from deltalens.metrics.blocks import cut, is_tall
from deltalens.metrics.masks import KEY_SHIFT, KEYS, Accumulator, MaskSpec, MaskSums
from deltalens.metrics.spectrum import GRAM_VALUES_DOWN_TO, GRAM_VECTORS_DOWN_TO, Factorisation
from deltalens.metrics.values import ceil_share

__all__ = ["DeviceColumns", "delta_pass_on", "factorise_on", "mask_sums_on", "sines_on", "singular_values_on"]

MASK_ELEMENTS = 1 << 24  # entries of the reconstruction at a time
MAGNITUDE = 0x7FFFFFFFFFFFFFFF


class DeviceColumns(SpectralColumns):
    """`SpectralColumns` with everything that grows with the matrix on `settings.device`."""

    def columns(self) -> dict[str, Any]:
        with enough_memory(self.settings.device, self.before.shape):
            return super().columns()

    def _factorise(self, values: np.ndarray) -> Factorisation:
        with enough_memory(self.settings.device, self.before.shape):
            return factorise_on(value_matrix(values, self.settings.device), self.k)

    def _delta_pass(self, after: np.ndarray) -> DeltaPass:
        return delta_pass_on(delta_matrix(self.before, after, self.settings.device), self.source)

    def _delta_values(self, after: np.ndarray) -> np.ndarray:
        return singular_values_on(delta_matrix(self.before, after, self.settings.device))

    def sines(self, before: np.ndarray, after: np.ndarray, ranks: Sequence[int]) -> list[float]:
        device = self.settings.device
        return sines_on(to_device(before, device), to_device(after, device), ranks)

    def _codes(self, part: slice) -> Any:
        device = self.settings.device
        before, after = (to_device(np.ascontiguousarray(cut(x, part)), device) for x in (self.before, self.after))
        return entry_codes_on(before, after, self.tau)

    def mask_sums(self, *arguments: Any) -> list[MaskSums]:
        return mask_sums_on(self.settings.device, *arguments)


def _host(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.cpu().numpy())


def _reduced(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(matrix, mode="r").R if matrix.shape[0] > matrix.shape[1] else matrix


def singular_values_on(matrix: torch.Tensor) -> np.ndarray:
    """All singular values, descending, of a (length, width) float64 matrix on a device."""
    eigenvalues = torch.linalg.eigvalsh(matrix.T @ matrix).flip(0)
    if eigenvalues[-1] > GRAM_VALUES_DOWN_TO * eigenvalues[0] or eigenvalues[0] == 0:
        return _host(eigenvalues.clamp(min=0).sqrt())
    return _host(torch.linalg.svdvals(_reduced(matrix)))


def factorise_on(matrix: torch.Tensor, k: int) -> Factorisation:
    """`metrics.spectrum.factorise` of a (length, width) float64 matrix on a device."""
    ascending, vectors = torch.linalg.eigh(matrix.T @ matrix)
    eigenvalues, short = ascending.flip(0), vectors[:, -k:].flip(1)
    values = eigenvalues.clamp(min=0).sqrt()
    if eigenvalues[k - 1] < GRAM_VECTORS_DOWN_TO * eigenvalues[0]:
        _, values, transposed = torch.linalg.svd(_reduced(matrix), full_matrices=False)
        short = transposed[:k].T
    top = values[:k]
    scale = torch.where(top > 1e-12 * values[0].clamp(min=1e-300), 1 / top, 0.0)
    return Factorisation(_host(matrix @ (short * scale)), _host(values), _host(short))


def delta_pass_on(delta: torch.Tensor, source: Factorisation) -> DeltaPass:
    """`metrics.alignment.delta_pass` of a (length, width) float64 update on a device."""
    long, short = (torch.from_numpy(x).to(delta.device) for x in (source.long, source.short))
    image, on_long = delta @ short, long.T @ delta
    return DeltaPass(_host((on_long**2).sum(1)), _host((image**2).sum(0)), _host(long.T @ image))


def sines_on(before: torch.Tensor, after: torch.Tensor, ranks: Sequence[int]) -> list[float]:
    """`metrics.alignment.principal_sines` of two bases on a device."""
    overlap = before.T @ after
    outside = after - before @ overlap
    outside_gram = outside.T @ outside
    means = []
    for k in ranks:
        put_back = overlap[k:, :k]
        gram = outside_gram[:k, :k] + put_back.T @ put_back
        means.append(float(torch.linalg.eigvalsh(gram).clamp(0, 1).sqrt().mean()))
    return means


def entry_codes_on(before: torch.Tensor, after: torch.Tensor, tau: float) -> torch.Tensor:
    """`metrics.masks.entry_codes` on a device, int32, flat."""
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
    codes: Callable[[slice], Any],
) -> list[MaskSums]:
    """`metrics.masks.principal_mask_sums` on a device: the same two passes, over larger blocks.

    `codes` may give NumPy arrays or tensors of the device.
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
        accumulators.append(Accumulator(table, largest, ceil_share(mask.share, prod(shape)), weights))
    for part in parts:
        piece = torch.as_tensor(codes(part), device=device)
        if not is_tall(shape):  # codes come in the matrix's own orientation, blocks with the longer side as rows
            piece = piece.reshape(shape[0], -1).T.reshape(-1)
        for mask, accumulator in zip(masks, accumulators, strict=True):
            k = mask.rank
            size = ((long[part, :k] * values[:k]) @ short[:, :k].T).abs_().reshape(-1)
            _add(accumulator, size, piece)
    return [accumulator.result() for accumulator in accumulators]


def _add(accumulator: Accumulator, size: torch.Tensor, codes: torch.Tensor) -> None:
    """Entries above the threshold's bin are counted by code: their sums are exact whatever the order."""
    inside = size > accumulator.high
    near = (size >= accumulator.low) & ~inside
    counts = torch.bincount(codes[inside], minlength=len(accumulator.weights)).cpu().numpy()
    accumulator.inside += int(counts.sum())
    accumulator.sums += (counts[:, None] * accumulator.weights).sum(axis=0)
    accumulator.near_values.append(_host(size[near]))
    accumulator.near_codes.append(_host(codes[near]))
