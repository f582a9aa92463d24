"""The principal mask against a full decomposition and a sort, ties counted by the share that fits."""

from fractions import Fraction
from functools import partial
from math import ceil

import numpy as np
import pytest
from spectra_fixtures import lapack_svd, with_spectrum

from deltalens.metrics import blocks
from deltalens.metrics.blocks import cut, value_blocks
from deltalens.metrics.masks import MaskSpec, entry_codes, principal_mask_sums
from deltalens.metrics.spectrum import factorise

SPECS = [MaskSpec(1, 0.01), MaskSpec(1, 0.05), MaskSpec(3, 0.1), MaskSpec(3, 0.5), MaskSpec(6, 0.2)]


def membership(source: np.ndarray, rank: int, share: float) -> np.ndarray:
    """(m, n) float64: 1 inside the mask, a fraction where tied at its threshold, else 0."""
    u, s, v = lapack_svd(source)
    size = np.abs((u[:, :rank] * s[:rank]) @ v[:, :rank].T)
    entries = ceil(Fraction(str(share)) * size.size)
    threshold = np.sort(size, axis=None)[::-1][entries - 1]
    tolerance = 1e-9 * size.max()
    above = size > threshold + tolerance
    tied = ~above & (size >= threshold - tolerance)
    return above + tied * ((entries - above.sum()) / tied.sum())


def mask_sums(source: np.ndarray, codes: np.ndarray, weights: np.ndarray, specs: list[MaskSpec]):
    m, n = source.shape
    factors = factorise(partial(value_blocks, source), max(m, n), min(m, n), max(spec.rank for spec in specs))
    return principal_mask_sums(
        factors, source.shape, weights, specs, lambda part: cut(codes, part).reshape(-1).astype(np.int32)
    )


def sources() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    gapped = with_spectrum(rng, 60, 40, 0.7 ** np.arange(40))
    small = with_spectrum(rng, 12, 10, 0.6 ** np.arange(10))
    signs = np.sign(rng.standard_normal(48))[:, None] * np.sign(rng.standard_normal(30))[None, :]
    two_levels = signs * np.where(np.arange(48) < 3, 2.0, 1.0)[:, None]
    return {
        "tall": gapped,
        "wide": np.ascontiguousarray(gapped.T),
        "repeated rows and columns": np.repeat(np.repeat(small, 4, axis=0), 3, axis=1),
        "all entries tied": signs * 0.25,
        "two levels": two_levels,
    }


@pytest.mark.parametrize("block_elements", [1 << 20, 97], ids=["one block", "many blocks"])
@pytest.mark.parametrize("name", sources())
def test_mask_against_a_sort(name, block_elements, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
    source = sources()[name]
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 5, source.shape)
    weights = rng.random((5, 3))
    rank_one = name in ("all entries tied", "two levels")  # further directions are noise
    specs = [spec for spec in SPECS if not rank_one or spec.rank == 1]
    if rank_one:
        specs = [*specs, MaskSpec(1, 0.3), MaskSpec(1, 0.9)]
    for spec, total in zip(specs, mask_sums(source, codes, weights, specs), strict=True):
        inside = membership(source, spec.rank, spec.share)
        assert total.entries == ceil(Fraction(str(spec.share)) * source.size)
        assert inside.sum() == pytest.approx(total.entries)
        wanted = np.einsum("ij,ijc->c", inside, weights[codes])
        np.testing.assert_allclose(total.sums, wanted, rtol=1e-12, err_msg=str(spec))


def test_where_all_entries_tie_a_mask_holds_its_share_of_everything():
    source = np.full((20, 30), -0.5)
    codes = np.zeros(source.shape, np.int64)
    codes[4, 5] = 1
    (total,) = mask_sums(source, codes, np.array([[0.0], [1.0]]), [MaskSpec(1, 0.1)])
    assert total.entries == 60
    assert total.sums[0] == pytest.approx(0.1)  # one entry, a tenth of it inside


def test_a_zero_source_has_only_ties():
    source = np.zeros((10, 8))
    (total,) = mask_sums(source, np.zeros(source.shape, np.int64), np.ones((1, 1)), [MaskSpec(1, 0.25)])
    assert total.sums[0] == pytest.approx(20)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.float64])
def test_entry_codes(dtype):
    rng = np.random.default_rng(1)
    words = [rng.integers(0x3C00, 0x3C80, (6, 9)).astype(np.uint16) | np.uint16(0x8000) for _ in range(2)]
    words[1][:3] = words[0][:3]
    floats = [(w.astype(np.uint32) << 16).view(np.float32) for w in words]
    sides = words if dtype == np.uint16 else [f.astype(dtype) for f in floats]
    tau = 1e-3
    codes = entry_codes(*sides, slice(0, 9), tau).reshape(6, 9)
    size = np.abs(floats[1] - floats[0])
    np.testing.assert_array_equal(codes % 32768, words[0] & 0x7FFF)
    np.testing.assert_array_equal(codes // 32768, (size > 0).astype(int) + (size > tau))
    assert set(np.unique(codes // 32768)) == {0, 1, 2}
