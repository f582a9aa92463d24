"""Every column of a row against the brute-force twin, in one block and in many."""

import ml_dtypes
import numpy as np
import polars as pl
import pytest
from twin import twin_row

import deltalens
from deltalens.metrics import blocks

BF16 = ml_dtypes.bfloat16
NAME = "model.layers.0.mlp.up_proj.weight"


def low_rank_plus_noise(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """A source whose principal subspaces are well determined at every ratio in use."""
    d = min(m, n)
    u, v = (np.linalg.qr(rng.standard_normal((side, d)))[0] for side in (m, n))
    return (u * 0.8 ** np.arange(d)) @ v.T


def pair(shape: tuple[int, int], dtype: type, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([*shape, seed])
    before = low_rank_plus_noise(rng, *shape)
    # Most updates stay under the spacing, some are large, some under the threshold.
    delta = 2e-4 * rng.standard_normal(shape) * (rng.random(shape) < 0.5)
    delta += 3e-6 * rng.standard_normal(shape) * (rng.random(shape) < 0.2)
    before = before.astype(dtype)
    return before, (before.astype(np.float64) + delta).astype(dtype)


def check(row: dict, twin: dict) -> None:
    for column, wanted in twin.items():
        mine = row[column]
        if wanted is None:
            assert mine is None, column
        elif isinstance(wanted, int):
            assert mine == wanted, column
        else:
            null = column.endswith(("_null", "_excess"))
            assert mine == pytest.approx(wanted, rel=1e-6 if null else 1e-7, abs=1e-12), column


SHAPES = [(90, 40), (40, 90), (48, 48), (30, 1), (1, 30), (3, 200)]


@pytest.mark.parametrize("elements", [1 << 20, 333], ids=["one block", "many blocks"])
@pytest.mark.parametrize("dtype", [BF16, np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_equals_its_twin(shape, dtype, elements, monkeypatch, write_checkpoint):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", elements)
    before, after = pair(shape, dtype)
    compare = "bf16" if dtype == BF16 else "stored"
    settings = deltalens.Settings(compare_dtype=compare, mask_rank=5, mask_share=0.5)
    result = deltalens.analyze(
        write_checkpoint({NAME: before}), write_checkpoint({NAME: after}), settings=settings, jobs=1
    )
    (row,) = result.tensors.iter_rows(named=True)
    twin = twin_row(before, after, extra=(5, 0.5))
    assert len(twin) >= 100
    check(row, twin)


def test_casting_first_is_the_twin_of_the_cast(write_checkpoint):
    before, after = pair((60, 30), np.float32)
    source, trained = write_checkpoint({NAME: before}), write_checkpoint({NAME: after})
    (row,) = deltalens.analyze(source, trained).tensors.iter_rows(named=True)
    twin = twin_row(before.astype(BF16), after.astype(BF16))
    # The bits are the stored ones, and the null runs from the stored weight to its word's boundaries.
    for column in [c for c in twin if c.endswith(("_null", "_excess")) or c == "unchanged_bits"]:
        del twin[column]
    check(row, twin)
    assert row["unchanged_bits"] == (before == after).mean()


def test_stored_bf16_is_subtracted_in_float32(write_checkpoint):
    before, after = pair((60, 30), BF16)
    settings = deltalens.Settings(compare_dtype="stored")
    (row,) = deltalens.analyze(
        write_checkpoint({NAME: before}), write_checkpoint({NAME: after}), settings=settings
    ).tensors.iter_rows(named=True)
    twin = twin_row(before.astype(np.float32), after.astype(np.float32))
    check(row, twin)
    assert row["relative_norm"] != twin_row(before, after)["relative_norm"]


@pytest.mark.parametrize("threshold", [0.0, 1e-4, 1e-2])
def test_another_threshold_and_other_ratios(threshold, write_checkpoint):
    before, after = pair((60, 30), BF16)
    settings = deltalens.Settings(threshold=threshold, ratios=(0.3, 0.025))
    (row,) = deltalens.analyze(
        write_checkpoint({NAME: before}), write_checkpoint({NAME: after}), settings=settings
    ).tensors.iter_rows(named=True)
    check(row, twin_row(before, after, threshold=threshold, ratios=(0.025, 0.1, 0.3)))
    assert "principal_projection_2.5pct" in row
    assert "principal_projection_20pct" not in row


def test_planted_ties_count_by_the_share_that_fits(write_checkpoint):
    """Repeated rows and columns tie the reconstruction, a few magnitudes tie the weights."""
    small_before, small_after = pair((15, 10), BF16)
    before = np.repeat(np.repeat(small_before, 4, axis=0), 3, axis=1)
    after = before.copy()
    rng = np.random.default_rng(3)
    moved = rng.random(before.shape) < 0.3
    after[moved] = np.repeat(np.repeat(small_after, 4, axis=0), 3, axis=1)[moved] * BF16(1.5)
    (row,) = deltalens.analyze(write_checkpoint({NAME: before}), write_checkpoint({NAME: after})).tensors.iter_rows(
        named=True
    )
    check(row, twin_row(before, after))

    signs = np.sign(rng.standard_normal((24, 1))) * np.sign(rng.standard_normal((1, 16)))
    before = (0.5 * signs).astype(BF16)
    after = np.where(rng.random(before.shape) < 0.2, BF16(2) * before, before)
    (row,) = deltalens.analyze(write_checkpoint({NAME: before}), write_checkpoint({NAME: after})).tensors.iter_rows(
        named=True
    )
    for which in ("principal", "low_magnitude"):  # all entries tie: a mask holds its share of everything
        assert row[f"{which}_coverage_10pct"] == pytest.approx(np.ceil(0.1 * 384) / 384)
        assert row[f"{which}_coverage_10pct_excess"] == pytest.approx(1.0)


def test_the_masks_of_the_mask_rank_option(write_checkpoint):
    before, after = pair((96, 128), BF16)
    settings = deltalens.Settings(mask_rank=64, mask_share=0.5)
    result = deltalens.analyze(write_checkpoint({NAME: before}), write_checkpoint({NAME: after}), settings=settings)
    (row,) = result.tensors.iter_rows(named=True)
    twin = twin_row(before, after, extra=(64, 0.5))
    names = [c for c in twin if "rank64_50pct" in c]
    assert len(names) == 2 * 2 * 4
    check(row, {name: twin[name] for name in names})
    assert result.summary["global"]["principal_coverage_rank64_50pct"]["pooled"] == pytest.approx(
        twin["principal_coverage_rank64_50pct"]
    )


def test_spectra_are_those_of_the_three_matrices(write_checkpoint):
    before, after = pair((40, 70), BF16)
    result = deltalens.analyze(write_checkpoint({NAME: before}), write_checkpoint({NAME: after}))
    assert result.spectra.columns == ["name", "which", "index", "value"]
    matrices = {"source": before, "trained": after, "delta": after - before}
    for which, matrix in matrices.items():
        part = result.spectra.filter(pl.col("which") == which)
        assert part["index"].to_list() == list(range(40))
        wanted = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
        np.testing.assert_allclose(part["value"].to_numpy(), wanted, rtol=1e-7)


def test_the_master_weights_show_what_rounding_hides(write_checkpoint):
    rng = np.random.default_rng(8)
    before = low_rank_plus_noise(rng, 60, 40).astype(BF16)
    master = before.astype(np.float32) + np.float32(3e-5) * rng.standard_normal(before.shape).astype(np.float32)
    result = deltalens.analyze(
        write_checkpoint({NAME: before}),
        write_checkpoint({NAME: master.astype(BF16)}),
        master=write_checkpoint({NAME: master}),
    )
    (row,) = result.tensors.iter_rows(named=True)
    twin = twin_row(before.astype(np.float32), master)
    for which in ("principal", "low_magnitude"):
        for ratio in ("1pct", "5pct", "10pct", "20pct"):
            name = f"{which}_coverage_{ratio}"
            assert row[f"{name}_master"] == pytest.approx(twin[name], abs=1e-12), name
        # An update without preference, seen before rounding, lies in a mask by the mask's size.
        assert row[f"{which}_coverage_10pct_master"] == pytest.approx(0.1, abs=0.02)
    assert row["low_magnitude_coverage_10pct"] > 2 * row["low_magnitude_coverage_10pct_master"]


def test_a_random_update_lies_at_its_simulated_null_and_a_structured_one_does_not(write_checkpoint):
    rng = np.random.default_rng(4)
    before = (0.05 * rng.standard_normal((128, 96))).astype(BF16)
    noise = 1e-4 * rng.standard_normal(before.shape)
    direction = np.outer(rng.standard_normal(128), rng.standard_normal(96))
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    after = [(before.astype(np.float64) + delta).astype(BF16) for delta in (noise, 1e-4 * direction)]
    settings = deltalens.Settings(null_draws=8)
    result = deltalens.analyze(
        write_checkpoint(dict.fromkeys(names, before)), write_checkpoint(dict(zip(names, after, strict=True))),
        settings=settings,
    )  # fmt: skip
    random, structured = result.tensors.iter_rows(named=True)
    for column in ("stable_rank", "top8_energy", "principal_projection_20pct", "left_projection_10pct"):
        assert random[f"{column}_null_std"] > 0
        assert abs(random[column] - random[f"{column}_null"]) < 6 * random[f"{column}_null_std"], column
    assert structured["stable_rank"] < structured["stable_rank_null"] - 20 * structured["stable_rank_null_std"]
    assert structured["top8_energy"] > structured["top8_energy_null"] + 20 * structured["top8_energy_null_std"]
    again = deltalens.analyze(
        write_checkpoint({names[0]: before}), write_checkpoint({names[0]: after[0]}), settings=settings
    )
    assert again.tensors["stable_rank_null"][0] == random["stable_rank_null"]  # seeded


def test_mean_and_deviation_of_the_null_are_those_of_its_draws(write_checkpoint):
    """The first of two draws is the only draw of a run with one; the second follows from the mean."""
    before, after = pair((40, 30), BF16)
    source, trained = write_checkpoint({NAME: before}), write_checkpoint({NAME: after})
    one, two = (
        deltalens.analyze(source, trained, settings=deltalens.Settings(null_draws=draws)).tensors.row(0, named=True)
        for draws in (1, 2)
    )
    for column in ("stable_rank", "top4_energy", "principal_projection_10pct", "right_projection_20pct"):
        first = one[f"{column}_null"]
        second = 2 * two[f"{column}_null"] - first
        assert one[f"{column}_null_std"] is None
        assert two[f"{column}_null_std"] == pytest.approx(abs(first - second) / np.sqrt(2)), column
        assert first != second
