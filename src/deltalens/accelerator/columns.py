"""The spectral columns of one matrix on a device, each the twin of a function in `metrics`.

The whole matrix is on the device in float64, so that nothing is cut into blocks but the reconstructions of the
principal masks. As in `metrics.spectrum`, a direct SVD is the last resort: on a GPU it costs many times an eigenvalue
decomposition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from deltalens.accelerator.device import delta_matrix, enough_memory, to_device, value_matrix
from deltalens.accelerator.masks import entry_codes_on, entry_weights, mask_sums_on
from deltalens.analysis.spectral import SpectralColumns
from deltalens.metrics.alignment import DeltaPass
from deltalens.metrics.blocks import cut
from deltalens.metrics.masks import MaskSums
from deltalens.metrics.rounding_null import RoundingNull
from deltalens.metrics.spectrum import GRAM_VALUES_DOWN_TO, GRAM_VECTORS_DOWN_TO, UNRESOLVED_SHARE, Factorisation

__all__ = ["DeviceColumns", "delta_pass_on", "factorise_on", "sines_on", "singular_values_on"]


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

    def _update(self, after: np.ndarray) -> tuple[np.ndarray, DeltaPass]:
        delta = delta_matrix(self.before, after, self.settings.device)
        return singular_values_on(delta), delta_pass_on(delta, self.source)

    def sines(self, before: np.ndarray, after: np.ndarray, ranks: Sequence[int]) -> list[float]:
        device = self.settings.device
        return sines_on(to_device(before, device), to_device(after, device), ranks)

    def _principal_sums(self) -> list[MaskSums]:
        return self._mask_sums(self.before, self.after, self.tau, self.nulls)

    def _master_sums(self, before: np.ndarray, master: np.ndarray, tau: float) -> list[MaskSums]:
        return self._mask_sums(before, master, tau, (None, None))

    def _mask_sums(
        self, before: np.ndarray, after: np.ndarray, tau: float, nulls: tuple[RoundingNull | None, ...]
    ) -> list[MaskSums]:
        device = self.settings.device

        def codes(part: slice) -> torch.Tensor:
            ours, theirs = (to_device(np.ascontiguousarray(cut(x, part)), device) for x in (before, after))
            return entry_codes_on(ours, theirs, tau)

        masks = [mask for mask, _ in self.masks]
        return mask_sums_on(device, self.source, before.shape, entry_weights(nulls), masks, codes)


def _host(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.cpu().numpy())


def _reduced(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(matrix, mode="r").R if matrix.shape[0] > matrix.shape[1] else matrix


def singular_values_on(matrix: torch.Tensor) -> np.ndarray:
    """All singular values, descending, of a (length, width) float64 matrix on a device."""
    products = matrix.T @ matrix
    ascending = torch.linalg.eigvalsh(products)
    if not _unresolved(ascending):
        return _host(ascending.flip(0).clamp(min=0).sqrt())
    return _host(_values(matrix, *torch.linalg.eigh(products)))


def _unresolved(ascending: torch.Tensor) -> int:
    """How many eigenvalues of a Gram matrix are too small for its rounding; none of a zero matrix's."""
    return int((ascending <= GRAM_VALUES_DOWN_TO * ascending[-1]).sum()) if ascending[-1] > 0 else 0


def _values(matrix: torch.Tensor, ascending: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """All singular values, descending, from the Gram matrix's eigenpairs; see `metrics.spectrum`."""
    values, unresolved = ascending.flip(0).clamp(min=0).sqrt(), _unresolved(ascending)
    if unresolved > UNRESOLVED_SHARE * values.numel():
        return torch.linalg.svdvals(_reduced(matrix))
    if unresolved:
        values[-unresolved:] = torch.linalg.svdvals(_reduced(matrix @ vectors[:, :unresolved]))
    return values.sort(descending=True).values


def factorise_on(matrix: torch.Tensor, k: int) -> Factorisation:
    """`metrics.spectrum.factorise` of a (length, width) float64 matrix on a device."""
    ascending, vectors = torch.linalg.eigh(matrix.T @ matrix)
    if ascending[-k] < GRAM_VECTORS_DOWN_TO * ascending[-1]:
        _, values, transposed = torch.linalg.svd(_reduced(matrix), full_matrices=False)
        short = transposed[:k].T
    else:
        values, short = _values(matrix, ascending, vectors), vectors[:, -k:].flip(1)
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
