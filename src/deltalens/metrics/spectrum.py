"""Singular values and factorisations in float64, from the smaller Gram matrix where it is accurate enough.

NumPy's `svd` is used rather than SciPy's: it releases the interpreter lock, so that two tensors are factorised at once
(checked with NumPy 2.4, SciPy 1.17).

A Gram matrix squares the condition: an eigenvalue λ carries an absolute error of some ε·λ₁, so a σ below √ε·σ₁ is
noise. Values are taken from it only while σ_min > 3e-4·σ₁ (relative error of σ then under 1e-8); otherwise, and
for nearly square matrices where it is as fast, from LAPACK's SVD of the matrix (of its R factor, by blocks, where
it is tall).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

from deltalens.metrics.blocks import Blocks
from deltalens.metrics.lapack import all_eigenvalues, all_singular_values_few_vectors, leading_eigenvectors

__all__ = [
    "NEARLY_SQUARE",
    "TOP_ENERGIES",
    "Factorisation",
    "factorise",
    "factorise_update",
    "product_singular_values",
    "singular_values",
    "spectrum_metrics",
]

TOP_ENERGIES = (1, 2, 4, 8, 16, 32, 64)
RANK_TOLERANCES = (1e-4, 1e-5, 1e-6)
GRAM_VALUES_DOWN_TO = 1e-7  # λ_min/λ₁ below which singular values are recomputed directly
GRAM_VECTORS_DOWN_TO = 1e-4  # λ_k/λ₁ below which singular vectors are recomputed directly
NEARLY_SQUARE = 1.3  # longer/shorter side up to which the direct SVD of values costs no more than the Gram way


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
    """Σ blockᵀ·block, (d, d) float64; NumPy turns `A.T @ A` into syrk."""
    total = np.zeros((width, width))
    for _, block in blocks():
        total += block.T @ block
    return total


def singular_values(blocks: Blocks, length: int, width: int) -> np.ndarray:
    """All singular values, descending, of the matrix that `blocks` yields with its longer side as rows.

    Args:
        blocks: gives (slice, float64 (b, d)) blocks; may be called twice.
        length: the longer side.
        width: the shorter side, d.
    """
    if length <= NEARLY_SQUARE * width:
        return np.linalg.svd(_reduced(blocks, width), compute_uv=False)
    eigenvalues = all_eigenvalues(gram(blocks, width))
    if eigenvalues[-1] > GRAM_VALUES_DOWN_TO * eigenvalues[0] or eigenvalues[0] == 0:
        return np.sqrt(np.maximum(eigenvalues, 0))
    return np.linalg.svd(_reduced(blocks, width), compute_uv=False)


def product_singular_values(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """All min(m, n) singular values of left · right (m × r, r × n) from its r × r core: exactly zero beyond rank r."""
    core = _r_factor(left.astype(np.float64)) @ _r_factor(right.T.astype(np.float64)).T
    values = np.zeros(min(left.shape[0], right.shape[1]))
    top = np.linalg.svd(core, compute_uv=False)[: values.size]
    values[: top.size] = top
    return values


def _r_factor(matrix: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.qr(matrix, mode="r"))  # NumPy's stubs say QRResult for every mode


def _reduced(blocks: Blocks, width: int) -> np.ndarray:
    """At most 2·d rows with the same singular values and right vectors: R factors merged block by block."""
    rows: list[np.ndarray] = []
    held = 0
    for _, block in blocks():
        rows.append(block.copy())
        held += block.shape[0]
        if held > 2 * width:
            rows = [_r_factor(np.concatenate(rows))]
            held = rows[0].shape[0]
    return np.concatenate(rows)


def factorise(blocks: Blocks, length: int, width: int, k: int) -> Factorisation:
    """Every singular value and the top `k` singular vectors of both sides.

    Directions whose singular value is under 1e-12·σ₁ have no left partner; their long vector is zero, so that a
    rank-deficient source has no more principal directions than its rank.
    """
    eigenvalues, short = leading_eigenvectors(gram(blocks, width), k)
    values = np.sqrt(np.maximum(eigenvalues, 0))
    if eigenvalues[k - 1] < GRAM_VECTORS_DOWN_TO * eigenvalues[0]:
        _, values, transposed = np.linalg.svd(_reduced(blocks, width), full_matrices=False)
        short = np.ascontiguousarray(transposed[:k].T)
    return Factorisation(_long_vectors(blocks, length, values[:k], short), values, short)


def factorise_update(
    blocks: Blocks, length: int, width: int, k: int, products: np.ndarray | None = None
) -> Factorisation:
    """`singular_values` of Δ and its top `k` singular vectors, for little more than the former; k is small beside d.

    `products`: Δ's Gram matrix (d, d) where it is at hand; overwritten. Not used for nearly square matrices.
    """
    if length <= NEARLY_SQUARE * width:
        values, short = all_singular_values_few_vectors(_reduced(blocks, width), k)
        smallest = values[k - 1] ** 2 / max(values[0] ** 2, 1e-300)
    else:
        products = gram(blocks, width) if products is None else products
        eigenvalues, short = leading_eigenvectors(products, k)
        smallest = eigenvalues[k - 1] / max(eigenvalues[0], 1e-300)
        values = np.sqrt(np.maximum(eigenvalues, 0))
        if smallest >= GRAM_VECTORS_DOWN_TO and eigenvalues[-1] <= GRAM_VALUES_DOWN_TO * eigenvalues[0]:
            values = np.linalg.svd(_reduced(blocks, width), compute_uv=False)
    if smallest < GRAM_VECTORS_DOWN_TO:
        _, values, transposed = np.linalg.svd(_reduced(blocks, width), full_matrices=False)
        short = np.ascontiguousarray(transposed[:k].T)
    return Factorisation(_long_vectors(blocks, length, values[:k], short), values, short)


def _long_vectors(blocks: Blocks, length: int, top: np.ndarray, short: np.ndarray) -> np.ndarray:
    """The partners (length, k) of the singular vectors `short`; zero where there is none."""
    scale = np.divide(1.0, top, out=np.zeros_like(top), where=top > 1e-12 * max(top[0], 1e-300))
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
