"""Spectra against LAPACK in float64, closed forms, and the block path against one block."""

from functools import partial
from math import exp, log

import numpy as np
import pytest
import torch
from spectra_fixtures import every_matrix, lapack_svd, matrix, with_spectrum

from deltalens.accelerator.columns import factorise_on, singular_values_on
from deltalens.metrics import blocks
from deltalens.metrics import spectrum as spectrum_module
from deltalens.metrics.blocks import value_blocks
from deltalens.metrics.lapack import SymmetricEigen
from deltalens.metrics.spectrum import (
    GRAM_VALUES_DOWN_TO,
    GRAM_VECTORS_DOWN_TO,
    factorise,
    gram,
    product_singular_values,
    singular_values,
    spectrum_metrics,
)

TOLERANCES = {"numerical_rank_1e-4": 1e-4, "numerical_rank_1e-5": 1e-5, "numerical_rank_1e-6": 1e-6}


def spectrum(values: np.ndarray) -> np.ndarray:
    return singular_values(partial(value_blocks, values), max(values.shape), min(values.shape))


@pytest.fixture(params=[1 << 20, 257], ids=["one block", "many blocks"])
def block_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", request.param)
    monkeypatch.setattr(spectrum_module, "REDUCED_ELEMENTS", request.param)
    return request.param


@pytest.mark.usefixtures("block_elements")
def test_200_matrices_against_lapack():
    seen = 0
    for label, values in every_matrix():
        mine, (_, theirs, _) = spectrum(values), lapack_svd(values)
        assert mine.shape == theirs.shape, label
        assert (np.diff(mine) <= 0).all(), label
        resolved = theirs > 1e-4 * theirs[0]
        np.testing.assert_allclose(mine[resolved], theirs[resolved], rtol=1e-7, err_msg=label)
        row = spectrum_metrics(mine)
        energy = theirs**2
        p = theirs[theirs > 0] / theirs.sum()
        wanted = {
            "spectral_norm": theirs[0],
            "stable_rank": energy.sum() / energy[0],
            "effective_rank": exp(-(p * np.log(p)).sum()),
            **{f"top{k}_energy": energy[:k].sum() / energy.sum() for k in (1, 2, 4, 8, 16, 32, 64)},
        }
        for column, value in wanted.items():
            assert row[column] == pytest.approx(value, rel=1e-8), (label, column)
        assert np.linalg.norm(mine) == pytest.approx(np.linalg.norm(values), rel=1e-8), label
        for column, tolerance in TOLERANCES.items():
            edge = tolerance * theirs[0]
            if not (np.abs(theirs - edge) < 1e-3 * edge).any():
                assert row[column] == np.count_nonzero(theirs > edge), (label, column)
                assert row[column.replace("rank_", "rank_fraction_")] == row[column] / theirs.size
        seen += 1
    assert seen == 200


@pytest.mark.parametrize("shape", [(60, 60), (200, 60), (60, 200)])
def test_numerical_rank_is_right_where_the_gram_matrix_sees_only_noise(shape):
    """Values on both sides of 1e-6 σ₁: their squares, 1e-12 λ₁, are within reach of the Gram matrix's rounding."""
    values = np.concatenate([np.logspace(0, -5.9, 40), np.logspace(-6.1, -9, 20)])
    row = spectrum_metrics(spectrum(with_spectrum(np.random.default_rng(1), *shape, values)))
    assert row["numerical_rank_1e-6"] == 40
    assert row["numerical_rank_1e-5"] == np.count_nonzero(values > 1e-5)
    assert row["numerical_rank_1e-4"] == np.count_nonzero(values > 1e-4)


@pytest.mark.parametrize("shape", [(150, 150), (150, 170), (900, 150), (150, 900)])
@pytest.mark.parametrize("small", [1, 30], ids=["one", "many"])
def test_what_the_gram_matrix_cannot_resolve_comes_from_the_matrix(shape, small, monkeypatch):
    """Without a direct SVD of the whole, and as accurate: to a few ε·σ₁."""
    wanted = np.concatenate([np.logspace(0, -2, 150 - small), np.logspace(-3.6, -9, small)])
    values = 7.0 * with_spectrum(np.random.default_rng(4), *shape, wanted)
    svd, sizes = spectrum_module.svd_values_in_place, []
    monkeypatch.setattr(spectrum_module, "svd_values_in_place", lambda a: sizes.append(a.shape[1]) or svd(a))
    mine = spectrum(values)
    assert sizes == [small]
    np.testing.assert_allclose(mine, lapack_svd(values)[1], rtol=1e-9, atol=7 * 4e-15)
    factors = factorise(partial(value_blocks, values), max(shape), 150, 8)
    np.testing.assert_array_equal(factors.values, mine)


def test_values_descend_where_the_two_kinds_meet():
    edge = GRAM_VALUES_DOWN_TO**0.5
    wanted = np.concatenate([np.logspace(0, -2, 100), np.full(20, edge * (1 + 1e-10))])  # rounding parts the last
    values = with_spectrum(np.random.default_rng(6), 130, 120, wanted)
    for mine in (spectrum(values), singular_values_on(torch.from_numpy(values))):
        assert (np.diff(mine) <= 0).all()
        np.testing.assert_allclose(mine, wanted, rtol=1e-7)


def test_a_gram_matrix_at_hand_is_used():
    values = matrix("tall", 5)
    blocks = partial(value_blocks, values)
    long, short = max(values.shape), min(values.shape)
    eigen = SymmetricEigen(gram(blocks, short))
    np.testing.assert_array_equal(singular_values(blocks, long, short, eigen), spectrum(values))
    assert singular_values(blocks, long, short, SymmetricEigen(np.eye(short))).tolist() == [1.0] * short


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("family", ["gaussian", "tall", "wide", "decaying", "condition_1e8", "row", "column"])
def test_factorisation_reconstructs(family):
    values = matrix(family, 3)
    d = min(values.shape)
    k = max(1, d // 5)
    u, s, v = lapack_svd(values)
    factors = factorise(partial(value_blocks, values), max(values.shape), d, k)
    assert factors.long.shape == (max(values.shape), k)
    resolved = s > 1e-4 * s[0]
    np.testing.assert_allclose(factors.values[resolved], s[resolved], rtol=1e-7)
    for basis in (factors.long, factors.short):
        np.testing.assert_allclose(basis.T @ basis, np.eye(k), atol=1e-9)
    mine = (factors.long * factors.values[:k]) @ factors.short.T
    mine = mine if values.shape[0] >= values.shape[1] else mine.T
    np.testing.assert_allclose(mine, (u[:, :k] * s[:k]) @ v[:, :k].T, atol=1e-8 * s[0])


LEVELS = {
    "one huge": lambda d: np.concatenate([[1e4], np.linspace(2, 1, d - 1)]),
    "two levels": lambda d: np.concatenate([np.linspace(2, 1, 8), np.linspace(2e-4, 1e-4, d - 8)]),
    "three levels": lambda d: np.concatenate([[1e6], np.linspace(2e3, 1e3, 8), np.linspace(2, 1, d - 9)]),
    "decaying": lambda d: np.logspace(0, -12, d),
}


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("shape", [(120, 120), (400, 100), (100, 400)])
@pytest.mark.parametrize("levels", LEVELS)
def test_vectors_of_small_values_come_from_what_the_large_ones_leave(shape, levels):
    """Subspaces as near to LAPACK's as the gap at their end allows, without an SVD of the matrix."""
    d = min(shape)
    wanted, k = LEVELS[levels](d), d // 4
    values = with_spectrum(np.random.default_rng(7), *shape, wanted)
    u, s, v = lapack_svd(values)
    assert s[k - 1] ** 2 < GRAM_VECTORS_DOWN_TO * s[0] ** 2
    factors = factorise(partial(value_blocks, values), max(shape), d, k)
    np.testing.assert_allclose(factors.short.T @ factors.short, np.eye(k), atol=1e-13)
    np.testing.assert_allclose(factors.long.T @ factors.long, np.eye(k), atol=1e-9)
    near = 3e-15 * s[0] / (s[k - 1] - s[k])  # what rounding to float64 alone may turn it by
    long, short = (u, v) if shape[0] >= shape[1] else (v, u)
    for mine, theirs in ((factors.long, long[:, :k]), (factors.short, short[:, :k])):
        assert np.linalg.norm(theirs - mine @ (mine.T @ theirs), 2) < near
    mine = (factors.long * factors.values[:k]) @ factors.short.T
    np.testing.assert_allclose(mine, (long[:, :k] * s[:k]) @ short[:, :k].T, rtol=0, atol=near * s[k - 1])


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_directions_beyond_the_rank_are_orthonormal_all_the_same(rank, monkeypatch):
    beside, looked = spectrum_module._gram_beside, []
    monkeypatch.setattr(spectrum_module, "_gram_beside", lambda *args: looked.append(1) or beside(*args))
    rng = np.random.default_rng(3)
    single = np.zeros((60, 40))
    single[7, 3] = 2.0  # what it leaves is zero, not noise
    for values in (rng.standard_normal((60, rank)) @ rng.standard_normal((rank, 40)), single * (rank == 1)):
        looked.clear()
        factors = factorise(partial(value_blocks, values), 60, 40, 38)
        np.testing.assert_allclose(factors.short.T @ factors.short, np.eye(38), atol=1e-13)
        assert (factors.long[:, rank if values.any() else 0 :] == 0).all()
        assert len(looked) == values.any()  # one look at what is left says that it is noise


def test_directions_beyond_the_rank_have_no_left_vector():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((50, 3)) @ rng.standard_normal((3, 20))
    factors = factorise(partial(value_blocks, values), 50, 20, 6)
    assert (factors.long[:, 3:] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(factors.long[:, :3], axis=0), 1.0)


def test_a_product_has_the_values_of_the_whole_and_exact_zeros_beyond_its_rank():
    rng = np.random.default_rng(0)
    for m, n, r in ((40, 30, 4), (30, 40, 4), (5, 6, 8)):
        left, right = rng.standard_normal((m, r)), rng.standard_normal((r, n))
        values = product_singular_values(left, right)
        d = min(m, n)
        assert values.shape == (d,)
        np.testing.assert_allclose(values[:r], np.linalg.svd(left @ right, compute_uv=False)[:r], rtol=1e-10)
        assert (values[r:] == 0).all()


def test_closed_forms():
    flat = spectrum_metrics(np.full(16, 3.0))
    assert flat["spectral_norm"] == 3.0
    assert flat["stable_rank"] == pytest.approx(16)
    assert flat["effective_rank"] == pytest.approx(16)
    assert flat["numerical_rank_1e-6"] == 16
    assert flat["numerical_rank_fraction_1e-6"] == 1.0
    assert flat["top4_energy"] == pytest.approx(4 / 16)
    assert flat["top64_energy"] == pytest.approx(1)
    assert flat["hill"] is None  # all values equal: no tail

    one = spectrum_metrics(np.array([2.0, 0.0, 0.0]))
    assert (one["stable_rank"], one["effective_rank"], one["numerical_rank_1e-4"]) == (1.0, 1.0, 1)
    assert one["numerical_rank_fraction_1e-4"] == 1 / 3
    assert one["hill"] is None  # σ_{k+1} = 0

    geometric = spectrum_metrics(2.0 ** -np.arange(40))
    k = 4  # ⌈0.1 · 40⌉; Σ_{i≤4} ln(σ_i/σ_5) = (4 + 3 + 2 + 1) ln 2
    assert geometric["hill"] == pytest.approx(k / (10 * log(2)))
    assert spectrum_metrics(2.0 ** -np.arange(6.0))["hill"] == pytest.approx(2 / (3 * log(2)))  # k is at least 2


def test_a_zero_matrix_has_no_spectrum_and_no_nan():
    row = spectrum_metrics(spectrum(np.zeros((12, 5))))
    assert row["spectral_norm"] == 0.0
    assert row["numerical_rank_1e-6"] == 0
    assert [row[name] for name in ("stable_rank", "effective_rank", "hill", "top1_energy")] == [None] * 4


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("elements", [1 << 20, 700], ids=["one block", "many blocks"])
def test_a_long_ill_conditioned_matrix_is_reduced_block_by_block(turned, elements, monkeypatch):
    """R factors of blocks, merged again and again, keep what a Gram matrix would square away."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(spectrum_module, "REDUCED_ELEMENTS", elements)
    wanted = np.logspace(2, -6.5, 24)
    values = with_spectrum(np.random.default_rng(2), 700, 24, wanted)
    values = values.T.copy() if turned else values
    np.testing.assert_allclose(spectrum(values), wanted, rtol=1e-6)
    factors = factorise(partial(value_blocks, values), 700, 24, 20)
    u, _, v = lapack_svd(values)
    long, short = (v, u) if turned else (u, v)
    for mine, theirs in ((factors.long, long), (factors.short, short)):
        np.testing.assert_allclose(np.abs((mine * theirs[:, :20]).sum(axis=0)), 1.0, atol=1e-6)


def test_the_device_twins_give_the_same_values():
    for label, values in every_matrix(each=4):
        tall = torch.from_numpy(values if values.shape[0] >= values.shape[1] else values.T.copy())
        mine = singular_values_on(tall)
        largest = mine[0]
        np.testing.assert_allclose(mine, lapack_svd(values)[1], rtol=1e-8, atol=1e-13 * largest, err_msg=label)
        assert (np.diff(mine) <= 0).all(), label
        factors = factorise_on(tall, min(3, mine.size))
        np.testing.assert_allclose(factors.values, mine, rtol=1e-8, atol=1e-13 * largest, err_msg=label)
        here = factorise(partial(value_blocks, values), max(values.shape), mine.size, min(3, mine.size))
        if mine.size > 3 and mine[2] - mine[3] > 1e-3 * largest:
            for ours, theirs in ((factors.long, here.long), (factors.short, here.short)):
                np.testing.assert_allclose(ours @ (ours.T @ theirs), theirs, atol=1e-8, err_msg=label)
    assert singular_values_on(torch.zeros(5, 3, dtype=torch.float64)).tolist() == [0.0] * 3


def test_a_device_needs_no_direct_svd_for_a_few_small_values(monkeypatch):
    wanted = np.concatenate([np.logspace(0, -2, 147), [1e-4, 1e-6, 1e-8]])
    values = torch.from_numpy(with_spectrum(np.random.default_rng(4), 160, 150, wanted))
    svd, sizes = torch.linalg.svdvals, []
    monkeypatch.setattr(torch.linalg, "svdvals", lambda a: sizes.append(a.shape[1]) or svd(a))
    np.testing.assert_allclose(singular_values_on(values), wanted, rtol=1e-9, atol=4e-15)
    assert sizes == [3]
