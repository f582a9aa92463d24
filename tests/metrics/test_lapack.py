import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltalens.metrics.lapack import all_eigenvalues, leading_eigenvectors


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6), st.booleans())
def test_equals_numpy(n, k, seed, deficient):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((max(1, n // 2) if deficient else n + 3, n))
    gram, k = factor.T @ factor, min(n, k)
    values, vectors = leading_eigenvectors(gram.copy(), k)
    expected = np.linalg.eigvalsh(gram)[::-1]
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-13 * n * max(expected[0], 1e-300))
    np.testing.assert_array_equal(all_eigenvalues(gram.copy()), values)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=1e-12)
    np.testing.assert_allclose(gram @ vectors, vectors * values[:k], atol=1e-12 * n * max(expected[0], 1e-300))


@pytest.mark.parametrize("n", [130, 257])
def test_blocked_sizes(n):
    rng = np.random.default_rng(n)
    factor = rng.standard_normal((2 * n, n))
    gram = factor.T @ factor
    values, vectors = leading_eigenvectors(gram.copy(), n // 5)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(gram)[::-1], rtol=1e-12)
    np.testing.assert_allclose(gram @ vectors, vectors * values[: n // 5], atol=1e-9 * values[0])
