"""What chance gives: the values that a Gaussian update of the same shape would show (METRICS.md, "Random values").

Energies follow the Marchenko-Pastur law (Math. USSR-Sbornik 1, 1967): the squared singular values of an m × n Gaussian
matrix. Its edge and bulk are reached as min(m, n) grows; below 64 a seeded simulation answers instead. That simulates
no m × n matrix: the singular values of a Gaussian matrix are those of a d × d bidiagonal one with independent
chi-distributed entries (Dumitriu and Edelman, J. Math. Phys. 43, 2002), whatever the longer side.
"""

from __future__ import annotations

from functools import lru_cache
from math import pi, sqrt
from typing import NamedTuple

import numpy as np

__all__ = [
    "ProjectionRandom",
    "projection_random",
    "stable_rank_random",
    "subspace_similarity_random",
    "top_energy_random",
]

SMALL = 64  # shorter sides than this are simulated
_DRAWS = 400


class ProjectionRandom(NamedTuple):
    """Expected shares of ‖Δ‖² in a source's top-k subspaces: both at once, the left, the right."""

    principal: float
    left: float
    right: float


def projection_random(m: int, n: int, k: int) -> ProjectionRandom:
    """(k/m)(k/n), k/m and k/n: a Gaussian m × n update spreads its energy evenly over any fixed subspace."""
    return ProjectionRandom(k / m * (k / n), k / m, k / n)


def subspace_similarity_random(size: int, k: int) -> float:
    """K/size: Sim_K of two independent uniform K-dimensional subspaces of `size` dimensions (n right, m left)."""
    return min(k / size, 1.0)


def stable_rank_random(m: int, n: int) -> float:
    """Expected ‖G‖_F² / σ₁² of an m × n Gaussian matrix: mn/(√m + √n)², or its simulated mean where min(m, n) < 64."""
    if min(m, n) < SMALL:
        energies = _simulated_energies(min(m, n), max(m, n))
        return float(np.mean(1.0 / energies[:, 0]))
    return m * n / (sqrt(m) + sqrt(n)) ** 2


@lru_cache(maxsize=1024)
def top_energy_random(m: int, n: int, k: int) -> float:
    """Expected share of ‖G‖_F² in the k largest of the min(m, n) squared singular values of a Gaussian matrix."""
    d = min(m, n)
    if k >= d:
        return 1.0
    if k <= 0:
        return 0.0
    if d < SMALL:
        return float(_simulated_energies(d, max(m, n))[:, :k].sum(axis=1).mean())
    angle, mass = _marchenko_pastur(d, max(m, n))
    t = float(np.interp(k / d, mass, angle))
    return (t - np.sin(t) * np.cos(t)) / pi


@lru_cache(maxsize=64)
def _marchenko_pastur(d: int, longer: int) -> tuple[np.ndarray, np.ndarray]:
    """Angles from the upper edge, and the law's mass above each.

    With c = d/longer and λ = 1 + c + 2√c cos θ the density becomes (2/π) sin²θ / λ dθ, and that of the energy, λ times
    it, (2/π) sin²θ dθ: free of c and integrated in closed form.
    """
    c = d / longer
    angle = np.linspace(0.0, pi, 40_001)
    middle = 0.5 * (angle[1:] + angle[:-1])
    density = 2.0 / pi * np.sin(middle) ** 2 / (1.0 + c + 2.0 * sqrt(c) * np.cos(middle))
    mass = np.concatenate(([0.0], np.cumsum(density)))
    return angle, mass / mass[-1]


@lru_cache(maxsize=256)
def _simulated_energies(d: int, longer: int) -> np.ndarray:
    """Squared singular values, descending, as shares of their sum: float64[draws, d], the same on every call."""
    rng = np.random.default_rng((d, longer))
    diagonal = np.sqrt(rng.chisquare(longer - np.arange(d), size=(_DRAWS, d)))
    below = np.sqrt(rng.chisquare(np.arange(d - 1, 0, -1), size=(_DRAWS, d - 1)))
    gram = np.zeros((_DRAWS, d, d))  # BBᵀ of the lower bidiagonal B is tridiagonal
    place = np.arange(d)
    gram[:, place, place] = diagonal**2
    gram[:, place[1:], place[1:]] += below**2
    gram[:, place[1:], place[:-1]] = gram[:, place[:-1], place[1:]] = below * diagonal[:, :-1]
    energies = np.linalg.eigvalsh(gram)[:, ::-1]
    return np.maximum(energies, 0.0) / energies.sum(axis=1, keepdims=True)
