"""How an update lies against the source's singular subspaces (METRICS.md, "Geometry against the source")."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deltalens.metrics.blocks import Blocks
from deltalens.metrics.lapack import add_gram, mirror
from deltalens.metrics.spectrum import Factorisation

__all__ = ["DeltaPass", "delta_pass", "delta_pass_and_gram", "principal_sines", "projections", "spectral_shift"]

SINE_ROWS = 768  # of two bases at a time: their difference stays in the cache, whatever the size of a vocabulary
CANCELLED = 1e-5  # share of ‖D‖² outside U below which a difference of Gram matrices would cost digits


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
    width, k = source.short.shape
    on_long, products = np.zeros((k, width)), np.zeros((width, width))
    for part, block in blocks():
        add_gram(products, block)
        basis = source.long[part]
        for some in _rows(on_long):  # of a whole image memory would be needed twice
            on_long[some] += basis[:, some].T @ block
    long_energy, core = np.einsum("kd,kd->k", on_long, on_long), on_long @ source.short
    mirror(products)
    np.matmul(source.short.T, products, out=on_long)
    return DeltaPass(long_energy, np.einsum("kd,dk->k", on_long, source.short), core), products


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
    ([G] computes them in float64 for that reason). (I − UUᵀ)U₊ is (I − UUᵀ)D of the difference D = U₊ ∓ U, column by
    column with the nearer sign. D is small already, so that its Gram matrix less that of UᵀD loses nothing, for two
    products in place of three. Where D lies in U's span all but entirely (an update that turns close singular vectors
    into each other and nothing else), the residual is formed itself. Taken against all K columns, once; for k < K the
    columns k … K of U are put back, so that only K × K matrices are left.
    """
    signs = np.where(np.einsum("nk,nk->k", before, after) < 0, -1.0, 1.0)
    inside, energy = np.zeros((signs.size, signs.size)), np.zeros((signs.size, signs.size))
    buffer = np.empty((min(SINE_ROWS, before.shape[0]), signs.size))  # fresh memory costs more than what is done in it
    for part in _rows(before):
        difference = buffer[: before[part].shape[0]]
        np.multiply(before[part], signs, out=difference)
        np.subtract(after[part], difference, out=difference)
        inside += before[part].T @ difference
        energy += difference.T @ difference
    overlap = inside + np.diag(signs)
    outside_gram = energy - inside.T @ inside
    if np.trace(outside_gram) < CANCELLED * np.trace(energy):
        outside_gram[:] = 0
        for part in _rows(before):
            outside = after[part] - before[part] @ overlap
            outside_gram += outside.T @ outside
    means = []
    for k in ranks:
        put_back = overlap[k:, :k]
        gram = outside_gram[:k, :k] + put_back.T @ put_back
        means.append(float(np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, 1)).mean()))
    return means


def _rows(basis: np.ndarray) -> Iterator[slice]:
    return (slice(start, start + SINE_ROWS) for start in range(0, basis.shape[0], SINE_ROWS))


def spectral_shift(before: np.ndarray, after: np.ndarray) -> float | None:
    """‖σ(W₊) − σ(W)‖ / ‖σ(W)‖ from all singular values, descending; None for a zero source ([G])."""
    norm = float(np.linalg.norm(before))
    return float(np.linalg.norm(after - before)) / norm if norm > 0 else None
