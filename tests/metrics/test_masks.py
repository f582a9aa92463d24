"""The principal mask against a full decomposition and a sort, ties counted by the share that fits."""

from fractions import Fraction
from functools import partial
from math import ceil

import numpy as np
import pytest
from spectra_fixtures import lapack_svd, with_spectrum

from deltalens.metrics import members
from deltalens.metrics.blocks import value_blocks
from deltalens.metrics.masks import MaskSpec, count_bits, magnitude_words, pack_updates
from deltalens.metrics.members import PrincipalMembers, find_members
from deltalens.metrics.spectrum import Factorisation, factorise

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


def members_of(source: np.ndarray, specs: list[MaskSpec]) -> PrincipalMembers:
    m, n = source.shape
    factors = factorise(partial(value_blocks, source), max(m, n), min(m, n), max(spec.rank for spec in specs))
    return find_members(factors, source, specs)


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


@pytest.mark.parametrize("block_elements", [1 << 18, 97], ids=["one block", "many blocks"])
@pytest.mark.parametrize("name", sources())
def test_masks_against_a_sort(name, block_elements, monkeypatch):
    monkeypatch.setattr(members, "BLOCK_ELEMENTS", block_elements)
    source = sources()[name]
    rng = np.random.default_rng(0)
    updates = rng.random((2, *source.shape)) < 0.4
    probabilities = rng.random((2, 32768))
    words = magnitude_words(source.reshape(-1)).reshape(source.shape)
    rank_one = name in ("all entries tied", "two levels")  # further directions are noise
    specs = [spec for spec in SPECS if not rank_one or spec.rank == 1]
    if rank_one:
        specs = [*specs, MaskSpec(1, 0.3), MaskSpec(1, 0.9), MaskSpec(1, 1.0)]
    held = members_of(source, specs)
    for _ in range(2):  # for one update after another
        found = held.sums([np.packbits(update) for update in updates], list(probabilities))
        for spec, total in zip(specs, found, strict=True):
            inside = membership(source, spec.rank, spec.share)
            assert total.entries == ceil(Fraction(str(spec.share)) * source.size)
            assert inside.sum() == pytest.approx(total.entries)
            weights = np.concatenate([updates, probabilities[:, words]])
            np.testing.assert_allclose(
                total.sums, np.einsum("ij,cij->c", inside, weights), rtol=1e-12, err_msg=str(spec)
            )


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", [(700, 90), (90, 700)])
def test_masks_where_float32_could_misplace_entries(shape, scale):
    """Entries nearer to one another than float32 resolves, and further apart than ties are."""
    rng = np.random.default_rng(4)
    signs = [rng.choice([-1.0, 1.0], size) for size in shape]
    source = scale * np.outer(signs[0] * (1 + 1e-8 * rng.integers(0, 40, shape[0])), signs[1])
    spec = MaskSpec(1, 0.3)
    (total,) = members_of(source, [spec]).sums([np.packbits(rng.random(shape) < 2)])
    assert total.sums[0] == pytest.approx(total.entries)
    update = rng.random(shape) < 0.5
    (total,) = members_of(source, [spec]).sums([np.packbits(update)])
    assert total.sums[0] == pytest.approx((membership(source, 1, 0.3) * update).sum(), rel=1e-12)


def test_a_mask_where_the_sampled_rows_mislead():
    """Sampled rows hold all of R but for a few entries: the threshold lies far below the guess."""
    long = np.full((5000, 1), 1e-3)
    long[np.unique(np.linspace(0, 4999, 1024).astype(int))] = 1.0
    factors = Factorisation(long, np.ones(1), np.ones((50, 1)))
    source = (long @ np.ones((1, 50))).astype(np.float32)
    held = find_members(factors, source, [MaskSpec(1, 0.5)])
    (total,) = held.sums([np.packbits(np.ones(source.shape, bool)), np.packbits(source == 1)])
    assert total.entries == 125_000
    assert total.sums.tolist() == pytest.approx([125_000, 1024 * 50])


def test_where_all_entries_tie_a_mask_holds_its_share_of_everything():
    source = np.full((20, 30), -0.5)
    update = np.zeros(source.shape, bool)
    update[4, 5] = True
    (total,) = members_of(source, [MaskSpec(1, 0.1)]).sums([np.packbits(update)])
    assert total.entries == 60
    assert total.sums[0] == pytest.approx(0.1)  # one entry, a tenth of it inside


def test_a_zero_source_has_only_ties():
    source = np.zeros((10, 8))
    (total,) = members_of(source, [MaskSpec(1, 0.25)]).sums([np.packbits(np.ones(source.shape, bool))])
    assert total.sums[0] == pytest.approx(20)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(6, 9), (3 * 65536 + 5,)])
def test_packed_updates_and_words(dtype, shape):
    rng = np.random.default_rng(1)
    words = [rng.integers(0x3C00, 0x3C80, shape).astype(np.uint16) | np.uint16(0x8000) for _ in range(2)]
    words[1][:3] = words[0][:3]
    floats = [(w.astype(np.uint32) << 16).view(np.float32) for w in words]
    sides = words if dtype == np.uint16 else [f.astype(dtype) for f in floats]
    tau = 2.0**-10
    size = np.abs(floats[1] - floats[0])
    for packed, expected in zip(pack_updates(*sides, tau), (size > tau, size > 0), strict=True):
        np.testing.assert_array_equal(packed, np.packbits(expected))
        assert count_bits(packed) == count_bits(packed, packed) == expected.sum()
        assert count_bits(packed, ~packed) == count_bits(packed, packed, ~packed) == 0
    np.testing.assert_array_equal(magnitude_words(sides[0]), words[0] & 0x7FFF)
