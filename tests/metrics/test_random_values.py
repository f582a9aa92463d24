"""The formulas for Gaussian updates against simulated Gaussian matrices."""

import numpy as np
import pytest

from deltalens.metrics.random_values import (
    projection_random,
    stable_rank_random,
    subspace_similarity_random,
    top_energy_random,
)


def simulated_energies(m: int, n: int, draws: int) -> np.ndarray:
    rng = np.random.default_rng(m * n)
    singular = np.array([np.linalg.svd(rng.normal(size=(m, n)), compute_uv=False) for _ in range(draws)])
    return singular**2 / np.sum(singular**2, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("m", "n", "draws", "tolerance"),
    [(1, 50, 20, 1e-12), (2, 2, 3000, 0.03), (8, 30, 800, 0.02), (40, 40, 300, 0.02), (63, 200, 100, 0.02),
     (96, 96, 100, 0.05), (300, 120, 40, 0.03)],
)  # fmt: skip
def test_stable_rank_and_top_energies(m, n, draws, tolerance):
    energies = simulated_energies(m, n, draws)
    assert stable_rank_random(m, n) == pytest.approx(np.mean(1 / energies[:, 0]), rel=tolerance)
    for k in (1, 2, 8, 32):
        expected = np.mean(energies[:, :k].sum(axis=1))
        assert top_energy_random(m, n, k) == pytest.approx(expected, rel=tolerance), k


def test_symmetric_in_the_sides_and_the_same_on_every_call():
    assert stable_rank_random(576, 1536) == pytest.approx(576 * 1536 / (np.sqrt(576) + np.sqrt(1536)) ** 2)
    assert stable_rank_random(20, 70) == stable_rank_random(70, 20)
    assert top_energy_random(100, 300, 5) == top_energy_random(300, 100, 5)


def test_limits_of_the_top_energy():
    assert top_energy_random(100, 300, 0) == 0.0
    assert top_energy_random(100, 300, 100) == top_energy_random(10, 30, 64) == 1.0
    shares = [top_energy_random(100, 300, k) for k in range(101)]
    assert np.all(np.diff(shares) > 0)
    assert np.all(np.diff(shares, 2) < 0)  # each further value holds less
    # A matrix much wider than tall has nearly equal singular values.
    assert top_energy_random(64, 10**9, 16) == pytest.approx(0.25, rel=1e-3)


def test_projections_of_a_random_update():
    rng = np.random.default_rng(0)
    m, n, k = 30, 50, 6
    left, right = np.linalg.qr(rng.normal(size=(m, k)))[0], np.linalg.qr(rng.normal(size=(n, k)))[0]
    deltas = rng.normal(size=(2000, m, n))
    total = np.sum(deltas**2)
    shares = [
        np.sum((left.T @ deltas @ right) ** 2) / total,
        np.sum((left.T @ deltas) ** 2) / total,
        np.sum((deltas @ right) ** 2) / total,
    ]
    assert projection_random(m, n, k) == pytest.approx(shares, rel=0.01)
    assert projection_random(576, 1536, 57).principal == pytest.approx(0.00367, rel=2e-3)


def test_similarity_of_random_subspaces():
    rng = np.random.default_rng(1)
    n, k = 60, 8
    similarities = []
    for _ in range(400):
        a, b = (np.linalg.qr(rng.normal(size=(n, k)))[0] for _ in range(2))
        similarities.append(np.sum((a.T @ b) ** 2) / k)
    assert subspace_similarity_random(n, k) == pytest.approx(np.mean(similarities), rel=0.03)
    assert subspace_similarity_random(5, 8) == 1.0
