"""Projections and rotations against the full singular value decomposition."""

from functools import partial

import numpy as np
import pytest
import scipy.linalg
from spectra_fixtures import FAMILIES, has_gap, lapack_svd, matrix, orthonormal, with_spectrum

from deltalens.metrics import alignment, blocks
from deltalens.metrics.alignment import delta_pass, delta_pass_and_gram, principal_sines, projections, spectral_shift
from deltalens.metrics.blocks import delta_blocks, value_blocks
from deltalens.metrics.spectrum import factorise


@pytest.mark.parametrize("block_elements", [1 << 20, 301], ids=["one block", "many blocks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_projections_against_lapack(family, block_elements, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
    compared = 0
    for seed in range(20):
        source = matrix(family, seed)
        rng = np.random.default_rng(seed)
        trained = source + 1e-2 * np.abs(source).max() * rng.standard_normal(source.shape)
        delta = trained - source
        m, n = source.shape
        d = min(m, n)
        u, s, v = lapack_svd(source)
        ranks = sorted({1, *(max(1, int(r * d)) for r in (0.05, 0.1, 0.2, 0.5)), *({8, 16} if d > 16 else ())})
        factors = factorise(partial(value_blocks, source), max(m, n), d, ranks[-1])
        passed = delta_pass(partial(delta_blocks, source, trained), factors)
        energy = float((delta**2).sum())
        for k in ranks:
            if not has_gap(s, k):
                continue
            joint, long, short = projections(passed, energy, k)
            left, right = (long, short) if m >= n else (short, long)
            uk, vk = u[:, :k], v[:, :k]
            assert joint == pytest.approx(((uk.T @ delta @ vk) ** 2).sum() / energy, rel=1e-8), (seed, k)
            assert left == pytest.approx(((uk.T @ delta) ** 2).sum() / energy, rel=1e-8), (seed, k)
            assert right == pytest.approx(((delta @ vk) ** 2).sum() / energy, rel=1e-8), (seed, k)
            compared += 1
    assert compared >= 10


@pytest.mark.parametrize("size", [1e-1, 1e-4, 1e-7, 0.0])
def test_sines_against_scipy(size):
    """Nearly equal subspaces are where √(1 − cos²) would cancel; SciPy takes the sine there too."""
    rng = np.random.default_rng(5)
    before = orthonormal(rng, 80, 12)
    after = np.linalg.qr(before + size * rng.standard_normal((80, 12)))[0] if size else before
    ranks = [1, 3, 7, 12]
    for k, mine in zip(ranks, principal_sines(before, after, ranks), strict=True):
        theirs = np.sin(scipy.linalg.subspace_angles(before[:, :k], after[:, :k])).mean()
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-14)


@pytest.mark.parametrize("size", [1e-2, 1e-6, 1e-9])
def test_sines_of_vectors_turned_into_each_other(size):
    """The bases differ much and their subspaces hardly: a difference of Gram matrices would leave noise of 1e-8."""
    rng = np.random.default_rng(6)
    before = orthonormal(rng, 80, 12)
    turn = orthonormal(rng, 12, 12)
    outside = rng.standard_normal((80, 12))
    outside -= before @ (before.T @ outside)
    after = np.linalg.qr((before + size * outside) @ turn)[0]
    (mine,) = principal_sines(before, after, [12])
    assert mine == pytest.approx(np.sin(scipy.linalg.subspace_angles(before, after)).mean(), rel=1e-6)


def test_rows_by_blocks_do_not_show(monkeypatch):
    rng = np.random.default_rng(7)
    before = orthonormal(rng, 80, 12)
    after = np.linalg.qr(before + 1e-3 * rng.standard_normal((80, 12)))[0]
    whole = principal_sines(before, after, [3, 12])
    monkeypatch.setattr(alignment, "SINE_ROWS", 7)
    assert principal_sines(before, after, [3, 12]) == pytest.approx(whole, rel=1e-10)


def test_a_planted_angle_is_found():
    angle = 0.3
    before = np.eye(10)[:, :3]
    after = before.copy()
    after[2, 2], after[7, 2] = np.cos(angle), np.sin(angle)
    assert principal_sines(before, after, [2, 3]) == pytest.approx([0.0, np.sin(angle) / 3])
    assert principal_sines(before, np.eye(10)[:, 5:8], [3]) == pytest.approx([1.0])


def test_spectral_shift():
    rng = np.random.default_rng(2)
    values = np.linspace(5, 1, 20)
    before = with_spectrum(rng, 30, 20, values)
    after = with_spectrum(rng, 30, 20, values * 1.5)  # other vectors: only the values count
    s, t = (np.linalg.svd(w, compute_uv=False) for w in (before, after))
    assert spectral_shift(s, t) == pytest.approx(0.5)
    assert spectral_shift(np.zeros(4), np.ones(4)) is None


@pytest.mark.parametrize("shape", [(50, 23), (23, 50), (31, 31)])
def test_one_pass_gives_the_gram_matrix_as_well(shape, monkeypatch):
    """Block by block, and a few vectors at a time."""
    monkeypatch.setattr(alignment, "SINE_ROWS", 5)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 200)
    rng = np.random.default_rng(0)
    source = rng.standard_normal(shape)
    trained = source + 1e-3 * rng.standard_normal(shape)
    factors = factorise(partial(value_blocks, source), max(shape), 23 if 23 in shape else 31, 12)
    of_delta = partial(delta_blocks, source, trained)
    passed, products = delta_pass_and_gram(of_delta, factors)
    plain, delta = delta_pass(of_delta, factors), trained - source
    for name in ("long_energy", "short_energy", "core"):
        np.testing.assert_allclose(getattr(passed, name), getattr(plain, name), rtol=1e-9, atol=1e-20)
    np.testing.assert_allclose(products, delta.T @ delta if shape[0] >= shape[1] else delta @ delta.T, atol=1e-18)
