"""Randomised methods and float32 passes against full float64 factorisations."""

from functools import partial

import numpy as np
import pytest

from deltalens.metrics.randomised import (
    effective_rank_estimate,
    leading_eigenpairs,
    principal_subspace,
    relative_residual,
)
from deltalens.metrics.single_precision import (
    gram_single,
    long_vectors,
    power_of_two_scale,
    single_delta_blocks,
    single_value_blocks,
)
from deltalens.metrics.spectrum import spectrum_metrics
from deltalens.metrics.values import delta_float64, round_to_bf16, word_values

LENGTH, WIDTH = 900, 700


def with_spectrum(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """(LENGTH, values.size) float64 with these singular values."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((LENGTH, values.size)))[0]
    right = np.linalg.qr(rng.standard_normal((values.size, values.size)))[0]
    return (left * values) @ right.T


SPECTRA = {
    "power law": np.arange(1, WIDTH + 1) ** -0.7,
    "flat": np.linspace(1, 0.8, WIDTH),
    "low rank and noise": np.concatenate([np.linspace(9, 5, 16), np.linspace(1, 0.01, WIDTH - 16)]),
    "clusters": np.repeat([8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125], WIDTH // 7),
}


@pytest.fixture(params=SPECTRA, scope="module")
def case(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """A float32 Gram matrix and the singular values behind it."""
    values = SPECTRA[request.param]
    matrix = with_spectrum(values).astype(np.float32)
    return matrix.T @ matrix, values


def test_leading_values(case: tuple[np.ndarray, np.ndarray]) -> None:
    gram, values = case
    found, vectors = leading_eigenpairs(gram, 64, seed=0)
    np.testing.assert_allclose(found, values[:64] ** 2, rtol=0.01)
    np.testing.assert_allclose(np.cumsum(found), np.cumsum(values[:64] ** 2), rtol=3e-3)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(64), atol=1e-4)


def test_effective_rank_within_its_stated_error(case: tuple[np.ndarray, np.ndarray]) -> None:
    gram, values = case
    estimate = effective_rank_estimate(gram, *leading_eigenpairs(gram, 64, seed=0), seed=0)
    exact = spectrum_metrics(values)["effective_rank"]
    assert exact is not None
    assert abs(estimate.value / exact - 1) < 0.01
    # Two standard errors, and a little for what the quadrature itself leaves out.
    assert abs(estimate.value - exact) < 1.5 * estimate.error + 1e-3 * exact


def test_stated_error_covers_what_float32_cannot_resolve() -> None:
    values = np.full(WIDTH, 1e-5)
    values[0] = 1.0  # the other σ² are 1e-10 of the largest: noise in float32, yet a part of Σσ
    matrix = with_spectrum(values).astype(np.float32)
    gram = matrix.T @ matrix
    estimate = effective_rank_estimate(gram, *leading_eigenpairs(gram, 64, seed=0), seed=0)
    assert estimate.error > 0.05 * estimate.value


@pytest.mark.parametrize("name", ["power law", "flat", "low rank and noise"])
def test_principal_subspace(name: str) -> None:
    values, k = SPECTRA[name], 140
    matrix = with_spectrum(values)
    single = matrix.astype(np.float32)
    found, vectors, residuals = principal_subspace(single.T @ single, k, seed=0)
    assert relative_residual(residuals, found) < 0.05
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=1e-4)
    captured = ((matrix @ vectors) ** 2).sum()
    assert captured > 0.995 * (values[:k] ** 2).sum()
    np.testing.assert_allclose(found[: k // 2], values[: k // 2] ** 2, rtol=0.01)


def test_same_seed_same_bits() -> None:
    gram = with_spectrum(SPECTRA["power law"]).astype(np.float32)
    gram = gram.T @ gram
    for a, b in zip(principal_subspace(gram, 70, seed=3), principal_subspace(gram, 70, seed=3), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(90, 40), (40, 90)])
def test_single_blocks(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    source = round_to_bf16(rng.standard_normal(shape).astype(np.float32)).reshape(shape)
    trained = round_to_bf16(word_values(source) + np.float32(1e-12) * rng.standard_normal(shape)).reshape(shape)
    trained[::2] = round_to_bf16(word_values(source[::2]) * np.float32(1.01)).reshape(trained[::2].shape)
    exact = np.empty(source.size)
    delta_float64(source.reshape(-1), trained.reshape(-1), exact)
    exact = exact.reshape(shape) if shape[0] >= shape[1] else exact.reshape(shape).T
    scale = power_of_two_scale(float((exact**2).sum()), exact.size)
    blocks = [block for _, block in single_delta_blocks(source, trained, scale)]
    np.testing.assert_array_equal(np.concatenate(blocks), (exact * scale).astype(np.float32))
    assert 0.5 <= (np.concatenate(blocks) ** 2).mean() <= 2
    values = np.concatenate([block for _, block in single_value_blocks(source, 4.0)])
    expected = word_values(source) * 4
    np.testing.assert_array_equal(values, expected if shape[0] >= shape[1] else expected.T)


def test_long_vectors() -> None:
    matrix = with_spectrum(SPECTRA["power law"])
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    blocks = partial(single_value_blocks, matrix.astype(np.float32), 1.0)
    long = long_vectors(blocks, np.ascontiguousarray(vt[:50].T), s[:50], LENGTH)
    np.testing.assert_allclose(long, u[:, :50], atol=1e-5)
    np.testing.assert_allclose(gram_single(blocks, WIDTH), matrix.T @ matrix, atol=1e-5)
