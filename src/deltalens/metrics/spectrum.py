"""Singular values and factorisations in float64, from the smaller Gram matrix where it is accurate enough.

A Gram matrix squares the condition: an eigenvalue λ carries an absolute error of some ε·λ₁, so a σ below √ε·σ₁ is
noise. Values are taken from it only while they are above 3e-4·σ₁ (relative error then under 1e-8). Those below are the
singular values of A·V, V being their eigenvectors: an error θ of V towards a direction of σ_j above adds but
(θ·σ_j)² ≈ (ε·λ₁/σ_j)² to σ², some 1e-24·λ₁ (Rayleigh and Ritz; LAPACK's own SVD is no better than ε·σ₁). Where these
are many, all values come from LAPACK's SVD of the matrix (of its R factor, by blocks, where it is tall). Vectors whose
σ is under 1e-2·σ₁ come from the Gram matrix of what is left when those of the larger ones are projected out.

Memory: one (d, d) matrix at a time, or 2·d rows for the R factor, besides the vectors asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

from deltalens.metrics.blocks import Blocks
from deltalens.metrics.lapack import SymmetricEigen, add_gram, leave_r_factor, svd_values_in_place

__all__ = [
    "TOP_ENERGIES",
    "Factorisation",
    "factorise",
    "product_singular_values",
    "singular_values",
    "spectrum_metrics",
]

TOP_ENERGIES = (1, 2, 4, 8, 16, 32, 64)
RANK_TOLERANCES = (1e-4, 1e-5, 1e-6)
GRAM_VALUES_DOWN_TO = 1e-7  # λ/λ₁ below which singular values are not taken from the Gram matrix
GRAM_VECTORS_DOWN_TO = 1e-4  # λ/λ₁ below which singular vectors are not taken from it
NO_PARTNER = 1e-12  # σ/σ₁ up to which a direction has no left singular vector
UNRESOLVED_SHARE = 1 / 4  # of all values, up to which their eigenvectors cost less than a direct SVD
REDUCED_ELEMENTS = 1 << 18  # of the rows added before an R factor is taken: of a narrow matrix many at once
ROWS = 256  # of a (d, d) matrix at a time


@dataclass(frozen=True, slots=True)
class Factorisation:
    """The top of a matrix's singular value decomposition, longer side first.

    Attributes:
        long: (max(m, n), k) float64, orthonormal singular vectors of the longer side.
        values: (d,) float64, every singular value, descending.
        short: (d, k) float64, singular vectors of the shorter side.
        residuals: (k,) float64, ‖AᵀAv − λv‖² of each vector where an iteration made them; None where exact.
    """

    long: np.ndarray
    values: np.ndarray
    short: np.ndarray
    residuals: np.ndarray | None = None


def gram(blocks: Blocks, width: int) -> np.ndarray:
    """Σ blockᵀ·block, (d, d) float64, in the upper triangle."""
    total = np.zeros((width, width))
    for _, block in blocks():
        add_gram(total, block)
    return total


def singular_values(blocks: Blocks, length: int, width: int, eigen: SymmetricEigen | None = None) -> np.ndarray:
    """All singular values, descending, of the matrix that `blocks` yields with its longer side as rows.

    Args:
        blocks: gives (slice, float64 (b, d)) blocks; may be called twice.
        length, width: the longer side and the shorter one, d.
        eigen: of its Gram matrix, where that is at hand; good for no more vectors afterwards.
    """
    eigen = eigen or SymmetricEigen(gram(blocks, width))
    values = np.sqrt(np.maximum(eigen.values, 0))
    unresolved = int(np.count_nonzero(eigen.values <= GRAM_VALUES_DOWN_TO * eigen.values[0]))
    if unresolved == 0 or values[0] == 0:
        return values
    if unresolved > UNRESOLVED_SHARE * width:
        eigen.let_go()
        return svd_values_in_place(_reduced(blocks, length, width))
    last = np.ascontiguousarray(eigen.last(unresolved))
    images = ((part, block @ last) for part, block in blocks())
    values[-unresolved:] = svd_values_in_place(_reduced(lambda: images, length, unresolved))
    return np.sort(values)[::-1]  # where the two kinds meet they differ by rounding


def product_singular_values(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """All min(m, n) singular values of left · right (m × r, r × n) from its r × r core: exactly zero beyond rank r."""
    core = _r_factor(left.astype(np.float64)) @ _r_factor(right.T.astype(np.float64)).T
    values = np.zeros(min(left.shape[0], right.shape[1]))
    top = np.linalg.svd(core, compute_uv=False)[: values.size]
    values[: top.size] = top
    return values


def _r_factor(matrix: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.qr(matrix, mode="r"))  # NumPy's stubs say QRResult for every mode


def _reduced(blocks: Blocks, length: int, width: int) -> np.ndarray:
    """Few rows (2·d, or 2 MB) with the same singular values and right vectors: R factors merged as the rows come."""
    step = max(width, REDUCED_ELEMENTS // width)
    rows = np.empty((min(length, width + step), width))
    held = 0
    for _, block in blocks():
        for start in range(0, block.shape[0], step):
            some = block[start : start + step]
            if held + some.shape[0] > rows.shape[0]:
                leave_r_factor(rows[:held])
                held = width
            rows[held : held + some.shape[0]] = some
            held += some.shape[0]
    return rows[:held]


def factorise(blocks: Blocks, length: int, width: int, k: int, eigen: SymmetricEigen | None = None) -> Factorisation:
    """Every singular value and the top `k` singular vectors of both sides.

    Directions whose singular value is under 1e-12·σ₁ have no left partner; their long vector is zero, so that a
    rank-deficient matrix has no more principal directions than its rank.

    `eigen`: of its Gram matrix (d, d), where that is at hand; good for no more vectors afterwards.
    """
    eigen = eigen or SymmetricEigen(gram(blocks, width))
    short = eigen.leading(_resolved(eigen.values, k))
    values = singular_values(blocks, length, width, eigen)
    eigen.let_go()  # before a second matrix of its size may be needed, and the long vectors are
    short = _completed(blocks, np.ascontiguousarray(short), k, values[0])
    return Factorisation(_long_vectors(blocks, length, values[:k], short), values, short)


def _resolved(values: np.ndarray, k: int) -> int:
    """Of the k largest eigenvalues of a Gram matrix (at least one), those whose vectors it resolves."""
    return max(1, int(np.count_nonzero(values[:k] >= GRAM_VECTORS_DOWN_TO * values[0])))


def _completed(blocks: Blocks, basis: np.ndarray, k: int, largest: float) -> np.ndarray:
    """The right singular vectors (d, k) of the k largest singular values, of which `largest` is σ₁.

    Args:
        basis: (d, j) the first of them, which the Gram matrix resolves. The next ones come from the Gram matrix of
            what is left when those are projected out, whose λ₁ is as small as they are; and so on.
    """
    while basis.shape[1] < k:
        eigen = SymmetricEigen(_gram_beside(blocks, basis))
        left = k - basis.shape[1]
        noise = eigen.values[0] <= (NO_PARTNER * largest) ** 2  # then any directions will do
        basis = np.concatenate([basis, eigen.leading(left if noise else _resolved(eigen.values, left))], axis=1)
    return basis


def _gram_beside(blocks: Blocks, basis: np.ndarray) -> np.ndarray:
    """The Gram matrix, (d, d) in the upper triangle, of the matrix with the directions of `basis` projected out.

    These get a negative eigenvalue, lest they be taken for directions in which the matrix is zero.
    """
    total = np.zeros((basis.shape[0], basis.shape[0]))
    for _, block in blocks():
        beside = block - (block @ basis) @ basis.T
        beside -= (beside @ basis) @ basis.T  # once leaves rounding errors of the size of what was projected out
        add_gram(total, np.ascontiguousarray(beside))
    scale = total.diagonal().max() or 1.0
    for start in range(0, total.shape[0], ROWS):
        part = slice(start, start + ROWS)
        total[part] -= scale * (basis[part] @ basis.T)
    return total


def _long_vectors(blocks: Blocks, length: int, top: np.ndarray, short: np.ndarray) -> np.ndarray:
    """The partners (length, k) of the singular vectors `short`; zero where there is none."""
    scale = np.divide(1.0, top, out=np.zeros_like(top), where=top > NO_PARTNER * max(top[0], 1e-300))
    scaled = short * scale
    long = np.empty((length, top.size))
    for part, block in blocks():
        np.matmul(block, scaled, out=long[part])
    return long


def spectrum_metrics(values: np.ndarray) -> dict[str, float | int | None]:
    """The columns of METRICS.md's "Spectrum of Δ" from all singular values (d,), descending.

    A zero matrix has no spectrum: norms and ranks are 0 and every ratio is None.
    """
    d = values.size
    row: dict[str, float | int | None] = {"spectral_norm": float(values[0]) if d else 0.0}
    energy = values**2
    total = float(energy.sum())
    zero = total == 0.0
    row["stable_rank"] = None if zero else total / float(energy[0])
    row["effective_rank"] = None if zero else _effective_rank(values)
    for tolerance in RANK_TOLERANCES:
        rank = 0 if zero else int(np.count_nonzero(values > tolerance * values[0]))
        key = f"numerical_rank_{tolerance:.0e}".replace("e-0", "e-")
        row[key] = rank
        row[key.replace("rank_", "rank_fraction_")] = rank / d
    for k in TOP_ENERGIES:
        row[f"top{k}_energy"] = None if zero else float(energy[:k].sum()) / total
    row["hill"] = None if zero else _hill(values)
    return row


def _effective_rank(values: np.ndarray) -> float:
    p = values / values.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def _hill(values: np.ndarray) -> float | None:
    """Hill's estimate of the tail index from the k = max(2, ⌈0.1 d⌉) largest values; None where it is undefined."""
    k = max(2, ceil(0.1 * values.size))
    if k >= values.size or values[k] <= 0:
        return None
    spread = float(np.log(values[:k] / values[k]).sum())
    return k / spread if spread > 0 else None
