"""Permuted updates: what they keep, and that their z-scores say chance where there is only chance."""

from functools import partial

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deltalens
from deltalens.metrics.blocks import value_blocks
from deltalens.metrics.permutation import permuted_updates, shuffle_within_exponents, source_exponents, z_score
from deltalens.metrics.values import word_values

BF16 = ml_dtypes.bfloat16
NAME = "model.layers.0.mlp.up_proj.weight"
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=40, deadline=None)
shapes = st.tuples(st.integers(1, 30), st.integers(1, 30))


def words(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    before = (0.05 * rng.standard_normal(shape)).astype(BF16)
    after = (before.astype(np.float64) + 1e-4 * rng.standard_normal(shape)).astype(BF16)
    return before.view(np.uint16), after.view(np.uint16)


def whole(blocks, shape: tuple[int, int]) -> np.ndarray:
    rows = np.concatenate([block for _, block in blocks()])
    return rows if shape[0] >= shape[1] else rows.T


@few
@given(shapes, seeds)
def test_sign_flips_keep_every_size_in_its_place(shape, seed):
    before, after = words(np.random.default_rng(seed), shape)
    delta = word_values(after).astype(np.float64) - word_values(before)
    copies = list(permuted_updates(before, after, "sign", 3, seed))
    for copy in copies:
        flipped = whole(copy.delta, shape)
        np.testing.assert_allclose(np.abs(flipped), np.abs(delta), rtol=2**-8)  # Δ is rounded to bf16
        assert np.array_equal(whole(copy.delta, shape), flipped)  # a second pass sees the same copy
        assert np.array_equal(whole(copy.trained, shape), word_values(before) + flipped)
    if np.count_nonzero(delta) > 40:
        first, second = (whole(copy.delta, shape) for copy in copies[:2])
        assert not np.array_equal(first, second)
        assert 0.1 < np.mean((first != second)[delta != 0]) < 0.9


@few
@given(shapes, seeds)
def test_shuffled_positions_keep_exponent_and_update_together(shape, seed):
    before, after = words(np.random.default_rng(seed), shape)
    exponents = source_exponents(before.reshape(-1))
    assert np.array_equal(exponents, np.frexp(np.abs(word_values(before).reshape(-1)))[1] + 126)
    delta = (word_values(after).astype(np.float64) - word_values(before)).astype(BF16).astype(np.float64)
    for copy in permuted_updates(before, after, "exponent", 2, seed):
        moved = whole(copy.delta, shape)
        for exponent in np.unique(exponents):
            here = (exponents == exponent).reshape(shape)
            assert np.array_equal(np.sort(moved[here]), np.sort(delta[here]))


def test_shuffled_positions_stay_on_the_grid():
    """Steps of some spacings within a binade: weight plus shuffled update is a bf16 number again."""
    rng = np.random.default_rng(4)
    shape = (40, 30)
    mantissa = rng.integers(32, 96, shape)
    base = (rng.integers(118, 124, shape) << 7) | (rng.integers(0, 2, shape) << 15)
    before = (base | mantissa).astype(np.uint16)
    after = (base | (mantissa + rng.integers(-9, 10, shape))).astype(np.uint16)

    def on_grid(values: np.ndarray) -> bool:
        return np.array_equal(values, values.astype(BF16).astype(np.float64))

    (copy,) = permuted_updates(before, after, "exponent", 1, 0)
    assert not np.array_equal(whole(copy.trained, shape), word_values(after))
    assert on_grid(whole(copy.trained, shape))
    free = rng.permutation(whole(copy.delta, shape).reshape(-1)).reshape(shape)
    assert not on_grid(word_values(before) + free)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_exponents_of_floats(kind):
    values = np.array([0.0, 1.0, -1.5, 3.0, 0.25], kind)
    bias = 127 if kind is np.float32 else 1023
    assert source_exponents(values).tolist() == [0, bias, bias, bias + 1, bias - 2]


def test_shuffling_moves_entries_and_is_seeded():
    delta = np.arange(1000, dtype=np.float32)
    exponents = np.repeat(np.array([3, 9], np.uint16), 500)
    copies = [delta.copy() for _ in range(3)]
    for copy, seed in zip(copies, (0, 0, 1), strict=True):
        shuffle_within_exponents(copy, exponents, np.random.default_rng(seed))
    assert np.array_equal(copies[0], copies[1])
    assert not np.array_equal(copies[0], copies[2])
    assert np.mean(copies[0] == delta) < 0.05
    assert set(copies[0][:500]) == set(range(500))


def test_z_score():
    assert z_score(3.0, [1.0, 2.0, 3.0]) == (2.0, 1.0, 1.0)
    assert z_score(3.0, [1.0]) == (1.0, None, None)
    assert z_score(3.0, [1.0, 1.0])[2] is None
    assert z_score(None, [1.0, 2.0])[2] is None


def analysed(write_checkpoint, before: np.ndarray, after: np.ndarray, **options):
    settings = deltalens.Settings(compare_dtype="stored", permutations=20, **options)
    result = deltalens.analyze(write_checkpoint({NAME: before}), write_checkpoint({NAME: after}), settings=settings)
    return result.tensors.row(0, named=True), result.summary


@pytest.mark.parametrize("kind", ["sign", "exponent"])
def test_z_is_standard_normal_for_a_symmetric_update_and_large_for_an_aligned_one(write_checkpoint, kind):
    rng = np.random.default_rng(11)
    scores = []
    for _ in range(12):
        before = (0.05 * rng.standard_normal((36, 24))).astype(np.float32)
        after = before + (1e-3 * rng.standard_normal(before.shape)).astype(np.float32)
        row, summary = analysed(write_checkpoint, before, after, permutation=kind)
        scores.append([row[f"{name}_20pct_z"] for name in ("principal_projection", "left_projection", "rotation")])
        median = summary["global"]["principal_projection_10pct"]["z"]
        assert median == pytest.approx(row["principal_projection_10pct_z"])
    # 12 draws of a t-like score: its mean has a deviation of 0.3, its spread one of about 0.25.
    assert np.all(np.abs(np.mean(scores, axis=0)) < 1.2)
    assert np.all((np.std(scores, axis=0) > 0.4) & (np.std(scores, axis=0) < 2.0))

    u, values, vt = np.linalg.svd(before.astype(np.float64), full_matrices=False)
    after = (before + 0.1 * (u[:, :2] * values[:2]) @ vt[:2]).astype(np.float32)
    row, _ = analysed(write_checkpoint, before, after, permutation=kind)
    for name in ("principal_projection", "left_projection", "right_projection"):
        assert row[f"{name}_10pct_z"] > 6, name
        assert row[f"{name}_10pct_permuted"] < 0.3 < row[f"{name}_10pct"]
    assert row["rotation_10pct_z"] < -1  # it stretches the source's own directions and turns none


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_columns_against_a_full_decomposition(write_checkpoint, shape):
    rng = np.random.default_rng(2)
    before = rng.standard_normal(shape).astype(np.float32)
    after = before + (1e-2 * rng.standard_normal(shape)).astype(np.float32)
    settings = deltalens.Settings(compare_dtype="stored", permutations=4, seed=5)
    row = deltalens.analyze(
        write_checkpoint({NAME: before}), write_checkpoint({NAME: after}), settings=settings
    ).tensors.row(0, named=True)
    u, _, vt = np.linalg.svd(before.astype(np.float64))
    found: dict[str, list[float]] = {"principal_projection": [], "left_projection": [], "rotation": []}
    k = 4
    for copy in permuted_updates(before, after, "sign", 4, 5):
        delta, trained = whole(copy.delta, shape), whole(copy.trained, shape)
        moved = np.linalg.svd(trained)[0][:, :k]
        energy = (delta**2).sum()
        found["principal_projection"].append(((u[:, :k].T @ delta @ vt[:k].T) ** 2).sum() / energy)
        found["left_projection"].append(((u[:, :k].T @ delta) ** 2).sum() / energy)
        sines = np.linalg.svd(moved - u[:, :k] @ (u[:, :k].T @ moved), compute_uv=False)
        found["rotation"].append(sines.mean())
    for name, values in found.items():
        mean, deviation, score = z_score(row[f"{name}_20pct"], values)
        assert row[f"{name}_20pct_permuted"] == pytest.approx(mean, rel=1e-6), name
        assert row[f"{name}_20pct_permuted_sd"] == pytest.approx(deviation, rel=1e-4), name
        assert row[f"{name}_20pct_z"] == pytest.approx(score, rel=1e-3, abs=1e-3), name


def test_a_zero_update_and_no_permutations_give_no_columns(write_checkpoint):
    before = np.random.default_rng(0).standard_normal((20, 12)).astype(BF16)
    row = deltalens.analyze(
        write_checkpoint({NAME: before}),
        write_checkpoint({NAME: before.copy()}),
        settings=deltalens.Settings(permutations=3),
    ).tensors.row(0, named=True)
    assert not [name for name in row if name.endswith(("_z", "_permuted"))]


def test_blocks_of_permuted_values_follow_the_source():
    values = np.arange(12.0).reshape(3, 4)
    assert np.array_equal(whole(partial(value_blocks, values), values.shape), values)
