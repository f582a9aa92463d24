"""What must not change when the weights are scaled, permuted or transposed, and what one bad value may touch."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deltalens

BF16 = ml_dtypes.bfloat16
NAME = "model.layers.0.self_attn.q_proj.weight"
few = settings(max_examples=25, deadline=None)

shapes = st.tuples(st.integers(10, 40), st.integers(10, 40))
seeds = st.integers(0, 2**32 - 1)


def with_gaps(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """bfloat16 weights whose singular values fall by a fifth each: a gap at every k in use."""
    d = min(shape)
    u, v = (np.linalg.qr(rng.standard_normal((side, d)))[0] for side in shape)
    return ((u * 0.8 ** np.arange(d)) @ v.T).astype(BF16)


def pair(seed: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    before = with_gaps(rng, shape)
    delta = 1e-3 * rng.standard_normal(shape) * (rng.random(shape) < 0.5)
    delta.flat[0] = 0.05  # never a zero update
    return before, (before.astype(np.float64) + delta).astype(BF16)


@pytest.fixture(scope="session")
def row_of(write_checkpoint):
    """Row of one matrix, from its two sides."""

    def row(before: np.ndarray, after: np.ndarray, **options: Any) -> dict[str, Any]:
        chosen = deltalens.Settings(**options)
        result = deltalens.analyze(
            write_checkpoint({NAME: before}), write_checkpoint({NAME: after}), settings=chosen, jobs=1
        )
        (found,) = result.tensors.iter_rows(named=True)
        return found

    return row


def assert_same(one: dict[str, Any], other: dict[str, Any], *, but: tuple[str, ...] = (), rel: float = 1e-8) -> None:
    assert one.keys() == other.keys()
    for column, value in one.items():
        if column in but:
            continue
        if isinstance(value, float):
            assert other[column] == pytest.approx(value, rel=rel, abs=1e-11), column
        else:
            assert other[column] == value, column


def columns_of_tau(row: dict[str, Any]) -> tuple[str, ...]:
    """Columns that look at an absolute threshold: they may change with the scale."""
    return tuple(
        c
        for c in row
        if c == "visible_count"
        or c.startswith("sparsity")
        or ("coverage" in c and "_nonzero" not in c and not c.endswith("_random"))
    )


@few
@given(seeds, shapes, st.integers(-20, 20))
def test_scaling_both_sides_by_a_power_of_two(row_of, seed, shape, exponent):
    before, after = pair(seed, shape)
    scale = BF16(2.0**exponent)
    row, scaled = row_of(before, after), row_of(before * scale, after * scale)
    energies = ("source_energy", "delta_energy", "spectral_norm")
    for column in energies:
        factor = 2.0**exponent if column == "spectral_norm" else 4.0**exponent
        assert scaled[column] == pytest.approx(row[column] * factor)
    assert_same(row, scaled, but=energies + columns_of_tau(row))


@few
@given(seeds, shapes, seeds)
def test_permuting_rows_and_columns(row_of, seed, shape, other_seed):
    before, after = pair(seed, shape)
    rng = np.random.default_rng(other_seed)
    rows, columns = rng.permutation(shape[0]), rng.permutation(shape[1])
    permuted = [side[rows][:, columns] for side in (before, after)]
    assert_same(row_of(before, after), row_of(*permuted), rel=1e-7)


@few
@given(seeds, shapes)
def test_transposing_swaps_left_and_right_and_nothing_else(row_of, seed, shape):
    before, after = pair(seed, shape)
    row, turned = row_of(before, after), row_of(before.T, after.T)
    assert turned.pop("shape") == "x".join(reversed(row.pop("shape").split("x")))
    swapped = {}
    for column, value in turned.items():
        if column.startswith("rotation_right_"):
            column = column.replace("rotation_right_", "rotation_")
        elif column.startswith("rotation_"):
            column = column.replace("rotation_", "rotation_right_")
        elif column.startswith(("left_", "right_")):
            side, rest = column.split("_", 1)
            column = f"{'right' if side == 'left' else 'left'}_{rest}"
        swapped[column] = value
    assert_same(row, {column: swapped[column] for column in row}, rel=1e-7)
    if shape[0] != shape[1]:
        assert row["left_projection_20pct"] != turned["left_projection_20pct"]


@few
@given(seeds, st.tuples(st.integers(12, 30), st.integers(12, 30)), st.integers(1, 8), st.sampled_from(["BF16", "F32"]))
def test_an_update_of_known_rank_has_it(row_of, seed, shape, rank, dtype):
    """Small integers are exact in every dtype; identity blocks make the factors' rank certain."""
    rng = np.random.default_rng(seed)
    left, right = rng.integers(-2, 3, (shape[0], rank)), rng.integers(-2, 3, (rank, shape[1]))
    left[:rank], right[:, :rank] = np.eye(rank), np.eye(rank)
    before = rng.integers(-40, 41, shape)
    kind = BF16 if dtype == "BF16" else np.float32
    row = row_of(before.astype(kind), (before + left @ right).astype(kind), compare_dtype="stored")
    for tolerance in ("1e-4", "1e-5", "1e-6"):
        assert row[f"numerical_rank_{tolerance}"] == rank
        assert row[f"numerical_rank_fraction_{tolerance}"] == rank / min(shape)
    assert row["stable_rank"] <= rank + 1e-9
    assert row["effective_rank"] <= rank + 1e-6


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (1, 9), (16,)])
def test_a_zero_update_gives_a_clean_row(row_of, shape):
    before = np.random.default_rng(0).standard_normal(shape).astype(BF16)
    row = row_of(before, before.copy(), null_draws=2)
    assert not any(isinstance(value, float) and not math.isfinite(value) for value in row.values())
    for column in ("unchanged_fraction", "unchanged_bits", "sparsity", "relative_sparsity"):
        assert row[column] == 1.0, column
    assert (row["relative_norm"], row["delta_energy"], row["visible_count"]) == (0.0, 0.0, 0)
    assert row["top_energy_1pct"] is None
    if len(shape) == 1:
        return
    assert row["spectral_norm"] == 0.0
    assert row["numerical_rank_1e-4"] == 0
    assert row["spectral_shift"] == pytest.approx(0.0, abs=1e-14)
    assert row["rotation_10pct"] == pytest.approx(0.0, abs=1e-12)
    undefined = ("stable_rank", "effective_rank", "hill", "top16_energy", "principal_projection_10pct",
                 "principal_coverage_10pct", "low_magnitude_coverage_10pct_nonzero",
                 "principal_coverage_10pct_null", "low_magnitude_coverage_10pct_excess")  # fmt: skip
    assert {column: row[column] for column in undefined} == dict.fromkeys(undefined)


def test_a_zero_source_gives_a_clean_row(row_of):
    after = (1e-3 * np.random.default_rng(0).standard_normal((20, 12))).astype(BF16)
    row = row_of(np.zeros((20, 12), BF16), after)
    assert not any(isinstance(value, float) and not math.isfinite(value) for value in row.values())
    assert row["relative_norm"] is None
    assert row["rotation_10pct"] is None
    assert row["spectral_shift"] is None
    assert row["numerical_rank_1e-4"] == 12


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("dtype", [BF16, np.float32])
def test_one_bad_value_is_reported_and_poisons_nothing_else(write_checkpoint, bad, side, dtype, tmp_path):
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    sides = [{}, {}]
    for i, name in enumerate(names):
        for tensors, values in zip(sides, pair(i, (20, 14)), strict=True):
            tensors[name] = values.astype(dtype)
    kept = [{name: tensors[name] for name in names if name != names[1]} for tensors in sides]
    clean = deltalens.analyze(*map(write_checkpoint, kept), settings=deltalens.Settings(compare_dtype="stored"))

    sides[side][names[1]] = sides[side][names[1]].copy()
    sides[side][names[1]][4, 5] = bad
    result = deltalens.analyze(
        *map(write_checkpoint, sides),
        settings=deltalens.Settings(compare_dtype="stored"),
        output=tmp_path / "out",  # its JSON admits no NaN
    )
    row = result.tensors.row(1, named=True)
    assert row["name"] == names[1]
    assert row["nonfinite_count"] == 1
    assert row["unchanged_bits"] is not None
    assert {row[c] for c in ("relative_norm", "sparsity", "stable_rank", "principal_coverage_10pct")} == {None}
    assert any(names[1] in warning for warning in result.summary["warnings"])
    others = result.tensors.filter(pl.col("name") != names[1])
    assert others.equals(clean.tensors.select(others.columns))
    for key, value in clean.summary["global"].items():
        if key not in ("tensors", "parameters", "nonfinite_tensors"):
            assert result.summary["global"][key] == value, key
    assert result.summary["global"]["nonfinite_tensors"] == 1


def _odd_pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    w = np.random.default_rng(0).standard_normal((12, 7))
    half = np.where(np.arange(12)[:, None] < 6, 0.0, w)
    return {
        "one weight": (np.ones((1, 1), BF16), 2 * np.ones((1, 1), BF16)),
        "a scalar": (np.array(1.0, np.float32), np.array(2.0, np.float32)),
        "all equal": (np.ones((12, 7), BF16), 2 * np.ones((12, 7), BF16)),
        "a convolution": (w.reshape(3, 2, 2, 7).astype(BF16), (1.01 * w).reshape(3, 2, 2, 7).astype(BF16)),
        "float16": (w.astype(np.float16), (1.01 * w).astype(np.float16)),
        "bf16 to float64": (w.astype(BF16), 1.01 * w),
        "float16 to bf16": (w.astype(np.float16), (1.01 * w).astype(BF16)),
        "near overflow": ((1e37 * w).astype(BF16), (1.01e37 * w).astype(BF16)),
        "subnormal": ((1e-39 * w).astype(BF16), (1.5e-39 * w).astype(BF16)),
        "negative zero": (np.zeros((12, 7), BF16), -np.zeros((12, 7), BF16)),
        "rows of zeros": (half.astype(BF16), (1.01 * half + 1e-6).astype(BF16)),
    }


@pytest.mark.parametrize("spectrum", ["exact", "none"])
@pytest.mark.parametrize("compare", ["bf16", "stored", "fp32"])
@pytest.mark.parametrize("name", _odd_pairs())
def test_odd_tensors_give_finite_rows(write_checkpoint, tmp_path, name, compare, spectrum):
    before, after = _odd_pairs()[name]
    result = deltalens.analyze(
        write_checkpoint({NAME: before}),
        write_checkpoint({NAME: after}),
        settings=deltalens.Settings(compare_dtype=compare, spectrum=spectrum, null_draws=2),
        output=tmp_path / "out",
    )
    (row,) = result.tensors.iter_rows(named=True)
    for column, value in row.items():
        assert not isinstance(value, float) or math.isfinite(value), column
        if value is not None and ("projection" in column or "coverage" in column) and "excess" not in column:
            assert -1e-12 <= value <= 1 + 1e-9, column
    assert row["parameters"] == before.size
    assert row["nonfinite_count"] == 0
