"""How an update lies against the source's singular subspaces (METRICS.md, "Geometry against the source")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deltalens.metrics.blocks import Blocks
from deltalens.metrics.spectrum import Factorisation

__all__ = ["DeltaPass", "delta_pass", "delta_pass_and_gram", "principal_sines", "projections", "spectral_shift"]

SINE_ROWS = 4096  # of two bases at a time, so that their residual is no second basis of a vocabulary


@dataclass(frozen=True, slots=True)
class DeltaPass:
    """What one pass over Δ gives: its image in the source's top-K bases.

    Attributes:
        long_energy: (K,) ‖Δᵀu_i‖² for each singular vector of the longer side.
        short_energy: (K,) ‖Δv_i‖² for each of the shorter side.
        core: (K, K) UᵀΔV.
    """

    long_energy: np.ndarray
    short_energy: np.ndarray
    core: np.ndarray


def delta_pass(blocks: Blocks, source: Factorisation) -> DeltaPass:
    """One pass over Δ's blocks (longer side as rows)."""
    on_long, core, short_energy = _Sum(), _Sum(), _Sum()
    for part, block in blocks():
        image = block @ source.short
        short_energy.add(np.einsum("bk,bk->k", image, image))
        basis = source.long[part]
        on_long.add(basis.T @ block)
        core.add(basis.T @ image)
    return DeltaPass(np.einsum("kd,kd->k", on_long.total, on_long.total), short_energy.total, core.total)


def delta_pass_and_gram(blocks: Blocks, source: Factorisation) -> tuple[DeltaPass, np.ndarray]:
    """`delta_pass` and Δ's Gram matrix (d, d), which spares one of its two products: ‖Δv‖² = vᵀ(ΔᵀΔ)v."""
    on_long, products = _Sum(), _Sum()
    for part, block in blocks():
        products.add(block.T @ block)
        on_long.add(source.long[part].T @ block)
    short_energy = np.einsum("kd,dk->k", source.short.T @ products.total, source.short)
    long_energy = np.einsum("kd,kd->k", on_long.total, on_long.total)
    return DeltaPass(long_energy, short_energy, on_long.total @ source.short), products.total


class _Sum:
    """Of arrays; mostly there is one, which then is neither copied nor added to zeros."""

    total: np.ndarray

    def add(self, term: np.ndarray) -> None:
        if hasattr(self, "total"):
            self.total += term
        else:
            self.total = term


def projections(passed: DeltaPass, energy: float, k: int) -> tuple[float, float, float]:
    """(joint, longer side, shorter side) share of ‖Δ‖² = `energy` inside the top-k subspaces."""
    joint = float((passed.core[:k, :k] ** 2).sum()) / energy
    return joint, float(passed.long_energy[:k].sum()) / energy, float(passed.short_energy[:k].sum()) / energy


def principal_sines(before: np.ndarray, after: np.ndarray, ranks: Sequence[int]) -> list[float]:
    """Mean sine of the principal angles between the leading k columns of two orthonormal bases, for each k.

    Args:
        before: (n, K) float64, orthonormal columns.
        after: (n, K) float64, orthonormal columns.
        ranks: the values of k, each at most K.

    The sines are the singular values of (I − UUᵀ)U₊, not √(1 − cos²), which cancels for near-identical subspaces
    ([G] computes them in float64 for that reason). The residual against all K columns is formed once; for k < K
    the columns k … K of U are put back, so that only K × K matrices are left.
    """
    overlap = before.T @ after
    outside_gram = np.zeros(overlap.shape)
    for start in range(0, before.shape[0], SINE_ROWS):
        part = slice(start, start + SINE_ROWS)
        outside = before[part] @ overlap
        np.subtract(after[part], outside, out=outside)
        outside_gram += outside.T @ outside
    means = []
    for k in ranks:
        put_back = overlap[k:, :k]
        gram = outside_gram[:k, :k] + put_back.T @ put_back
        means.append(float(np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, 1)).mean()))
    return means


def spectral_shift(before: np.ndarray, after: np.ndarray) -> float | None:
    """‖σ(W₊) − σ(W)‖ / ‖σ(W)‖ from all singular values, descending; None for a zero source ([G])."""
    norm = float(np.linalg.norm(before))
    return float(np.linalg.norm(after - before)) / norm if norm > 0 else None
