"""Leading singular values, effective rank and principal subspaces from a Gram matrix, without factorising it.

Everything works on G = AᵀA (d × d, float32), to which each method applies blocks of vectors:

- the leading values by block Lanczos (Golub & Underwood 1977; Musco & Musco 2015 for its accuracy on singular values);
- Σσ and Σσ log σ, of which the entropy behind the effective rank consists, by stochastic Lanczos quadrature (Ubaru,
  Chen & Saad 2017), with the leading directions taken out exactly (as Hutch++ does: Meyer et al. 2021);
- the principal subspace by Chebyshev-filtered subspace iteration (Zhou, Saad, Tiago & Chelikowsky 2006).

All are seeded and repeatable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from deltalens.metrics.lapack import orthonormalised

__all__ = [
    "GramOperator",
    "RankEstimate",
    "effective_rank_estimate",
    "leading_eigenpairs",
    "principal_subspace",
    "relative_residual",
]

BLOCK = 24  # columns of block Lanczos
ORTHONORMAL = 1e-4  # error of a basis' inner products beyond which it is made again
DEPTH = 14  # applications of G; the basis has BLOCK · (DEPTH + 1) columns
PROBES = 16  # of stochastic Lanczos quadrature
STEPS = 28  # Lanczos steps a probe
ROUNDING = 4 * float(np.finfo(np.float32).eps)  # of the largest eigenvalue: error of a float32 Gram matrix's
DEGREE = 10  # of the Chebyshev filter
ROUNDS = 4  # of filtering, at most
HEAD = 3.0  # Ritz values this many times the smallest one are filtered no further
ENOUGH = 0.0125  # root mean square of ‖Gv − λv‖/λ: coverages are then well within 1 %


@dataclass(frozen=True, slots=True)
class RankEstimate:
    """exp(entropy of σ/Σσ) and its error (two standard errors of the probes, and what float32 leaves open)."""

    value: float
    error: float


class GramOperator(Protocol):
    """What stands for AᵀA: a (d, d) float32 array, or anything that applies it to a (d, b) float32 block."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __matmul__(self, block: np.ndarray, /) -> np.ndarray: ...


def leading_eigenpairs(gram: GramOperator, k: int, seed: int, *, depth: int = DEPTH) -> tuple[np.ndarray, np.ndarray]:
    """The k largest eigenvalues (descending, float64) and their vectors (d, k) of a symmetric (d, d) float32 matrix.

    `depth`: applications of the matrix to a block, which is what the time goes into.
    """
    d = gram.shape[0]
    block = max(BLOCK, -(-k // 4))
    if block * (depth + 1) >= d:
        values, vectors = np.linalg.eigh((gram @ np.eye(d, dtype=np.float32)).astype(np.float64))
        return values[::-1][:k].copy(), vectors[:, ::-1][:, :k].copy()
    rng = np.random.default_rng(seed)
    basis = np.empty((d, block * (depth + 1)), np.float32)
    image = np.empty_like(basis)
    current = orthonormalised(rng.standard_normal((d, block), np.float32))
    for step in range(depth + 1):
        here = slice(step * block, (step + 1) * block)
        basis[:, here] = current
        image[:, here] = gram @ current
        if step < depth:
            held = basis[:, : here.stop]
            following = image[:, here] - held @ (held.T @ image[:, here])
            following = orthonormalised(following)
            following -= held @ (held.T @ following)  # twice is enough
            current = orthonormalised(following)
    # A matrix of low rank leaves nothing but noise to follow with, which may lie in what is held already.
    if np.abs(basis.T @ basis - np.eye(basis.shape[1], dtype=np.float32)).max() > ORTHONORMAL:
        basis = orthonormalised(basis)
        image = gram @ basis
    return _rayleigh_ritz(basis, image, k)


def _rayleigh_ritz(basis: np.ndarray, image: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Leading Ritz pairs of G on an orthonormal basis, with image = G · basis."""
    core = (basis.T @ image).astype(np.float64)
    values, turn = np.linalg.eigh((core + core.T) / 2)
    return values[::-1][:k].copy(), basis @ turn[:, ::-1][:, :k].astype(np.float32)


def principal_subspace(gram: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leading k eigenvalues (float64, descending), vectors (d, k) float32, and squared residuals (k,) float64.

    A residual is ‖G v − λ v‖² for unit v. Rounds of filtering stop once the root mean square of ‖G v − λ v‖/λ is
    under `ENOUGH`, or after `ROUNDS`: the caller looks at the residuals.
    """
    d = gram.shape[0]
    width = min(d, k + max(16, k // 6))
    rng = np.random.default_rng(seed)
    basis = rng.standard_normal((d, width), np.float32)
    for _ in range(2):  # the filter needs a fair guess at where the unwanted end of the spectrum begins
        basis = orthonormalised(gram @ basis)
    for left in range(ROUNDS, -1, -1):
        image = gram @ basis
        core = (basis.T @ image).astype(np.float64)
        values, turn = np.linalg.eigh((core + core.T) / 2)
        values, turn = np.maximum(values[::-1], 1e-30), turn[:, ::-1].astype(np.float32)
        basis, image = basis @ turn, image @ turn
        residual = image[:, :k] - basis[:, :k] * values[:k].astype(np.float32)
        residuals = np.einsum("dk,dk->k", residual, residual, dtype=np.float64)
        if left == 0 or relative_residual(residuals, values[:k]) < ENOUGH:
            break
        basis = orthonormalised(_filter(gram, basis, image, values))
    return values[:k].copy(), np.ascontiguousarray(basis[:, :k]), residuals


def relative_residual(residuals: np.ndarray, values: np.ndarray) -> float:
    """Root mean square of ‖G v − λ v‖/λ from the squared residuals (k,) and the eigenvalues (k,)."""
    return float(np.mean(residuals / values**2)) ** 0.5


def _filter(gram: np.ndarray, basis: np.ndarray, image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Ritz vectors with what lies below the smallest Ritz value damped.

    A Chebyshev polynomial that damps [0, edge] grows so fast above it that in float32 the leading directions would
    drown the others. Directions above `HEAD` times the edge, which converge by themselves, take a power step
    instead, and are projected out of the others at each step.
    """
    edge = float(values[-1])
    head = int(np.count_nonzero(values > HEAD * edge))
    leading = basis[:, :head]
    half = np.float32(edge / 2)

    def step(block: np.ndarray) -> np.ndarray:
        out = (gram @ block - half * block) / half
        return np.asarray(out - leading @ (leading.T @ out))

    before = basis[:, head:]
    current = image[:, head:] / half - before
    for _ in range(DEGREE - 1):
        before, current = current, 2 * step(current) - before
    # The recurrence is linear in the columns: each is brought back to the size of the others before they are made
    # orthogonal, leading ones first.
    current /= np.linalg.norm(current, axis=0)
    return np.concatenate([image[:, :head] / values[:head].astype(np.float32), current], axis=1)


def effective_rank_estimate(gram: np.ndarray, values: np.ndarray, vectors: np.ndarray, seed: int) -> RankEstimate:
    """Effective rank of A from G = AᵀA.

    Args:
        gram: (d, d) float32.
        values: (k,) its leading eigenvalues.
        vectors: (d, k) their vectors; these directions are summed exactly, the rest is estimated.
        seed: of the probes.
    """
    floor = ROUNDING * float(values[0])
    nodes, weights = _quadrature(gram, vectors, seed)
    estimates = [_entropy(values, nodes + shift, weights) for shift in (0.0, -floor, floor)]
    entropy, influence = estimates[0]
    statistical = 2 * float(np.std(influence, ddof=1)) / len(influence) ** 0.5
    numerical = max(abs(other - entropy) for other, _ in estimates[1:])
    rank = float(np.exp(entropy))
    return RankEstimate(rank, rank * float(np.expm1(statistical + numerical)))


def _entropy(values: np.ndarray, nodes: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Entropy of σ/Σσ and each probe's influence on it."""
    top = np.sqrt(np.maximum(values, 0))
    rest = np.sqrt(np.maximum(nodes, 0))
    sums = top.sum() + (weights * rest).sum(axis=1)
    logs = _xlogx(top).sum() + (weights * _xlogx(rest)).sum(axis=1)
    total, log_total = float(sums.mean()), float(logs.mean())
    influence = ((sums - total) * (1 + log_total / total) - (logs - log_total)) / total
    return float(np.log(total)) - log_total / total, influence


def _xlogx(values: np.ndarray) -> np.ndarray:
    return values * np.log(values, out=np.zeros_like(values), where=values > 0)


def _quadrature(gram: np.ndarray, vectors: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss nodes (p, s) and weights (p, s), each probe's adding up to d − k, of G's spectrum outside `vectors`."""
    d, k = vectors.shape
    steps = min(STEPS, d - k)
    probes = np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), (d, PROBES))
    probes -= vectors @ (vectors.T @ probes)
    held = np.zeros((PROBES, steps, d), np.float32)
    diagonal, off = np.zeros((PROBES, steps)), np.zeros((PROBES, max(steps - 1, 0)))
    current = probes / np.linalg.norm(probes, axis=0)
    for step in range(steps):
        held[:, step] = current.T
        image = gram @ current
        diagonal[:, step] = np.einsum("dp,dp->p", image, current)
        if step == steps - 1:
            break
        image -= vectors @ (vectors.T @ image)
        following = image.T[:, :, None]
        seen = held[:, : step + 1]
        for _ in range(2):  # full reorthogonalisation: float32 Lanczos vectors lose it within a few steps
            following = following - seen.transpose(0, 2, 1) @ (seen @ following)
        norm = np.linalg.norm(following[:, :, 0], axis=1)
        off[:, step] = norm
        # An exhausted Krylov space gives rounding noise; the coupling of zero cuts the quadrature there.
        alive = norm > 1e-6 * np.maximum(diagonal[:, 0], 1e-30)
        off[~alive, step] = 0
        current = np.where(alive, following[:, :, 0].T / np.maximum(norm, 1e-30), np.float32(0))
    tridiagonal = np.zeros((PROBES, steps, steps))
    index = np.arange(steps)
    tridiagonal[:, index, index] = diagonal
    tridiagonal[:, index[:-1], index[1:]] = off
    tridiagonal[:, index[1:], index[:-1]] = off
    nodes, turn = np.linalg.eigh(tridiagonal)
    return nodes, (d - k) * turn[:, 0, :] ** 2
