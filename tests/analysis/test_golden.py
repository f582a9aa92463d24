"""The golden pairs against what the paper's script computed on them, at the tolerances of METRICS.md."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import deltalens

PAIRS = ("llama-bf16", "llama-fp32")
RATIOS = ("1pct", "5pct", "10pct", "20pct")
FEW_UPDATES = 2000

Row = dict[str, Any]


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest, golden: Path) -> tuple[str, Path, deltalens.AnalysisResult]:
    """Name of the pair, folder of the reference tables, and our analysis."""
    folder = golden / request.param
    settings = deltalens.Settings(compare_dtype="fp32" if request.param == "llama-fp32" else "bf16")
    result = deltalens.analyze(folder / "source", folder / "trained", settings=settings)
    return request.param, folder / "reference", result


def ours(result: deltalens.AnalysisResult) -> dict[str, Row]:
    return {row["name"]: row for row in result.tensors.iter_rows(named=True)}


def reference(folder: Path, table: str) -> list[Row]:
    with (folder / f"{table}.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


class Gaps:
    """Collects every value over tolerance, so that one failure shows them all."""

    def __init__(self) -> None:
        self.compared, self.over = 0, []

    def check(self, row: Row, column: str, theirs: str, *, rel: float = 0.0, absolute: float = 0.0) -> None:
        if theirs in ("", "nan"):
            return
        self.compared += 1
        mine, wanted = row[column], float(theirs)
        if mine is None or not abs(mine - wanted) <= absolute + rel * abs(wanted):
            self.over.append(f"{row['name']} {column}: {mine} against {wanted}")

    def done(self, at_least: int) -> None:
        assert not self.over, "\n".join(self.over)
        assert self.compared >= at_least, self.compared


def test_every_tensor_of_the_reference_has_a_row(pair):
    _, folder, result = pair
    assert set(ours(result)) == {row["name"] for row in reference(folder, "tensor_metrics")}
    assert result.summary["skipped"] == []


def test_counts_are_exact_and_norms_agree(pair):
    _, folder, result = pair
    rows, gaps = ours(result), Gaps()
    for theirs in reference(folder, "tensor_metrics"):
        row = rows[theirs["name"]]
        size = int(theirs["numel"])
        assert row["parameters"] == size
        assert row["unchanged_count"] == round(float(theirs["frac_delta_eq_0"]) * size), row["name"]
        for exponent in (8, 7, 6, 5, 4):
            count = round(float(theirs[f"frac_isclose_zero_atol_1e-{exponent}"]) * size)
            assert row[f"sparsity_1e-{exponent:02d}_count"] == count, (row["name"], exponent)
        assert size - row["visible_count"] == row["sparsity_1e-05_count"]
        gaps.check(row, "relative_norm", theirs["relative_delta_fro"], rel=1e-4)
        for column, key in (("0.1pct", "0p1pct"), ("1pct", "1pct"), ("5pct", "5pct")):
            gaps.check(row, f"top_energy_{column}", theirs[f"coord_top_{key}_energy_ratio"], rel=2e-4, absolute=1e-8)
    gaps.done(at_least=20)


def test_spectra_agree(pair):
    _, folder, result = pair
    rows, gaps = ours(result), Gaps()
    for theirs in reference(folder, "svd_metrics"):
        row = rows[theirs["name"]]
        gaps.check(row, "spectral_norm", theirs["spectral_norm"], rel=1e-4)
        gaps.check(row, "stable_rank", theirs["stable_rank"], rel=2e-4)
        gaps.check(row, "effective_rank", theirs["effective_rank_entropy"], rel=2e-4)
        gaps.check(row, "numerical_rank_1e-4", theirs["rank_tol_1e_4"])
        gaps.check(row, "numerical_rank_fraction_1e-4", theirs["rank_pct_tol_1e_4"], absolute=1e-12)
        for k in (1, 2, 4, 8, 16, 32, 64):
            gaps.check(row, f"top{k}_energy", theirs[f"top{k}_energy_ratio"], rel=2e-4)
    gaps.done(at_least=12 * 14)


def test_geometry_agrees(pair):
    _, folder, result = pair
    rows, gaps = ours(result), Gaps()
    for theirs in reference(folder, "base_geometry_metrics"):
        if theirs["skipped_reason"]:
            continue
        row = rows[theirs["name"]]
        gaps.check(row, "spectral_shift", theirs["spectral_drift_l2_ratio"], rel=2e-2, absolute=1e-6)
        for ratio in RATIOS:
            for side in ("principal", "left", "right"):
                key = f"{'' if side == 'principal' else side + '_'}principal_projection_energy_ratio_{ratio}"
                gaps.check(row, f"{side}_projection_{ratio}", theirs[key], rel=1e-3, absolute=1e-8)
            angle = theirs[f"top_subspace_rotation_{ratio}"]
            fine = bool(angle) and float(angle) > 1e-2
            gaps.check(row, f"rotation_{ratio}", angle, rel=2e-2 if fine else 0.0, absolute=0.0 if fine else 2e-3)
    gaps.done(at_least=17 * 14)


def test_coverages_agree(pair):
    name, folder, result = pair
    rows, gaps = ours(result), Gaps()
    for theirs in reference(folder, "mask_overlap_metrics"):
        row = rows[theirs["name"]]
        kind = "_nonzero" if float(theirs["update_mask_atol"]) == 0 else ""
        if kind:
            assert row["nonzero_count"] == int(theirs["update_count"])
        few = int(theirs["update_count"]) < FEW_UPDATES
        absolute = 1e-3 if name == "llama-fp32" else (0.02 if few else 0.01)
        for ratio in RATIOS:
            for which in ("principal", "low_magnitude"):
                key = f"{which}_{ratio}_update_overlap_ratio"
                gaps.check(row, f"{which}_coverage_{ratio}{kind}", theirs[key], absolute=absolute)
    gaps.done(at_least=8 * 28)


def test_summary_agrees(pair):
    _, folder, result = pair

    theirs = json.loads((folder / "summary.json").read_text())
    mine = result.summary["global"]
    assert mine["tensors"] == theirs["total_tensors_analyzed"]
    assert mine["parameters"] == theirs["total_parameters_analyzed"]
    assert mine["relative_norm"] == pytest.approx(theirs["global_relative_delta_norm"], rel=1e-4)
    assert mine["unchanged_fraction"] == pytest.approx(theirs["global_frac_delta_eq_0"], abs=1e-12)
    for exponent in (8, 7, 6, 5, 4):
        wanted = theirs[f"global_frac_isclose_zero_atol_1e-{exponent}"]
        assert mine["sparsity_at"][f"1e-{exponent:02d}"] == pytest.approx(wanted, abs=1e-12)
    for statistic in ("mean", "median"):
        for column, key in (("stable_rank", "stable_rank"), ("effective_rank", "effective_rank_entropy"),
                            ("top8_energy", "top8_energy_ratio"), ("top16_energy", "top16_energy_ratio")):  # fmt: skip
            assert mine[column][statistic] == pytest.approx(theirs[f"{statistic}_{key}"], rel=2e-4)


def test_coverages_of_the_bf16_pair_are_what_rounding_alone_gives(golden: Path):
    """Its update has no preference by construction, so the excess over the rounding null is one."""
    result = deltalens.analyze(golden / "llama-bf16" / "source", golden / "llama-bf16" / "trained")
    for which in ("principal", "low_magnitude"):
        for kind in ("", "_nonzero"):
            coverage = result.summary["global"][f"{which}_coverage_10pct{kind}"]
            assert coverage["excess"] == pytest.approx(1.0, abs=0.02), (which, kind)
            assert coverage["excess_low"] < coverage["excess"] < coverage["excess_high"]
