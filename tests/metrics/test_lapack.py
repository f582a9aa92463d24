import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltalens.metrics import lapack
from deltalens.metrics.lapack import (
    SymmetricEigen,
    add_gram,
    leading_eigenvectors,
    leave_r_factor,
    mirror,
    orthonormalised,
    svd_values_in_place,
)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6), st.booleans())
def test_equals_numpy(n, k, seed, deficient):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((max(1, n // 2) if deficient else n + 3, n))
    gram, k = factor.T @ factor, min(n, k)
    values, vectors = leading_eigenvectors(gram.copy(), k)
    expected = np.linalg.eigvalsh(gram)[::-1]
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-13 * n * max(expected[0], 1e-300))
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=1e-12)
    np.testing.assert_allclose(gram @ vectors, vectors * values[:k], atol=1e-12 * n * max(expected[0], 1e-300))
    eigen = SymmetricEigen(gram.copy())
    last = eigen.last(k)
    np.testing.assert_array_equal(eigen.values, values)
    np.testing.assert_array_equal(eigen.leading(k), vectors)  # in any order
    np.testing.assert_allclose(last.T @ last, np.eye(k), atol=1e-12)
    np.testing.assert_allclose(gram @ last, last * values[n - k :], atol=1e-12 * n * max(expected[0], 1e-300))


@pytest.mark.parametrize("n", [130, 257])
@pytest.mark.parametrize("crowded", [1.5, lapack.CROWDED])
def test_blocked_sizes(n, crowded, monkeypatch):
    """By inverse iteration, and by MRRR where it would have too many neighbours to make orthogonal."""
    monkeypatch.setattr(lapack, "CROWDED", crowded)
    by_mrrr, made = SymmetricEigen._by_mrrr, []
    monkeypatch.setattr(SymmetricEigen, "_by_mrrr", lambda *args: made.append(args) or by_mrrr(*args))
    rng = np.random.default_rng(n)
    values = np.concatenate([np.linspace(1, 2, n - 10), 3 + 1e-4 * np.arange(10)])  # a bunch of ten at the top
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    gram, k = (q * values) @ q.T, n // 5
    found, vectors = leading_eigenvectors(gram.copy(), k)
    assert len(made) == (crowded == 1.5)
    np.testing.assert_allclose(found, values[::-1], rtol=1e-12)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=1e-12)
    np.testing.assert_allclose(gram @ vectors, vectors * found[:k], atol=1e-12)


def test_crowding_is_the_mean_size_of_the_bunches():
    values = np.array([0.0, 0.5, 1.0, 1.0005, 1.001, 1.5, 1.9995, 2.0])
    eigen = SymmetricEigen(np.diag(values))
    assert eigen._crowding(0, 8) == (1 + 1 + 9 + 1 + 4) / 8  # gaps under 2e-3 join
    assert eigen._crowding(0, 4) == (1 + 1 + 4) / 4
    assert eigen._crowding(5, 6) == 1


@given(st.integers(0, 30), st.integers(1, 150), st.sampled_from([np.float32, np.float64]), st.booleans())
def test_gram_matrices_add_up_block_by_block(rows, d, kind, turned):
    rng = np.random.default_rng([rows, d])
    blocks = [rng.standard_normal((b, d)).astype(kind) for b in (rows, 7)]
    total = np.zeros((d, d), kind)
    for block in blocks:
        add_gram(total, np.asfortranarray(block) if turned else block)
    whole = np.concatenate(blocks).astype(np.float64)
    expected, tolerance = whole.T @ whole, 1e-5 if kind is np.float32 else 1e-13
    np.testing.assert_allclose(np.triu(total), np.triu(expected), rtol=0, atol=tolerance * (rows + 7))
    assert (np.tril(total, -1) == 0).all()
    assert mirror(total) is total
    np.testing.assert_allclose(total, expected, rtol=0, atol=tolerance * (rows + 7))
    np.testing.assert_array_equal(total, total.T)


@given(st.integers(1, 130), st.integers(0, 60))
def test_q_factor(k, more):
    block = np.random.default_rng([k, more]).standard_normal((k + more, k)).astype(np.float32)
    q = orthonormalised(block.copy())
    assert q.dtype == np.float32
    np.testing.assert_allclose(q.T @ q, np.eye(k), atol=1e-5)
    np.testing.assert_allclose(q @ (q.T @ block), block, atol=2e-4)  # the same span


@given(st.integers(1, 130), st.integers(0, 200), st.floats(0, 12))
def test_r_factor_and_values_in_place(d, more, decades):
    """As accurate as a direct SVD: to a few ε·σ₁, whatever the condition."""
    rng = np.random.default_rng([d, more])
    matrix = rng.standard_normal((d + more, d)) * np.logspace(0, -decades, d)
    expected = np.linalg.svd(matrix, compute_uv=False)
    rows = matrix.copy()
    leave_r_factor(rows)
    factor = rows[:d].copy()
    assert (np.tril(factor, -1) == 0).all()
    np.testing.assert_allclose(factor.T @ factor, matrix.T @ matrix, rtol=0, atol=1e-13 * (d + more))
    for given_rows in (matrix.copy(), factor):
        values = svd_values_in_place(given_rows)
        assert (np.diff(values) <= 0).all()
        np.testing.assert_allclose(values, expected, rtol=0, atol=4e-15 * (1 + d / 20) * expected[0])


def test_the_matrix_is_let_go():
    matrix = np.diag([3.0, 2.0, 1.0])
    eigen, held = SymmetricEigen(matrix), weakref.ref(matrix)
    vectors = eigen.leading(2)
    del matrix
    assert held() is not None
    eigen.let_go()
    assert held() is None
    assert eigen.values.tolist() == [3.0, 2.0, 1.0]
    np.testing.assert_array_equal(np.abs(vectors), np.eye(3)[:, :2])
