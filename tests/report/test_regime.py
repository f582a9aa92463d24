"""Placing a run among the published rows."""

from __future__ import annotations

import math
from statistics import pstdev

import pytest
from report_fixtures import make_summary

from deltalens.report.published import ENERGY_SHARES, OPD, PUBLISHED, RLVR, SFT, PublishedRow
from deltalens.report.regime import FAR, place, run_figures

FULL = [row for row in PUBLISHED if row.stable_rank is not None]


def _as_run(row: PublishedRow) -> dict:
    return make_summary(
        relative_norm=row.relative_norm,
        sparsity=row.sparsity,
        sparsity_at={"1e-05": row.sparsity},
        top16_energy={"mean": row.top16_energy, "median": None},
        stable_rank={"mean": row.stable_rank, "median": None},
    )


def _distance(a: PublishedRow, b: PublishedRow) -> float:
    """The rule of the module, written out a second time."""
    total = 0.0
    for read in (
        lambda row: math.log10(row.relative_norm),
        lambda row: row.sparsity,
        lambda row: row.top16_energy,
        lambda row: math.log10(row.stable_rank),
    ):
        total += ((read(a) - read(b)) / pstdev([read(row) for row in FULL])) ** 2
    return math.sqrt(total / 4)


@pytest.mark.parametrize("row", FULL, ids=lambda row: row.name)
def test_a_published_row_is_placed_on_itself(row: PublishedRow) -> None:
    placement = place(_as_run(row))
    assert placement.regimes == (row.regime,)
    nearest, distance = placement.distances[0]
    assert nearest == row
    assert distance == pytest.approx(0)
    assert dict(placement.distances) == pytest.approx({other: _distance(row, other) for other in FULL})


def test_the_caveat_on_rlvr_is_true() -> None:
    """Left out of the table, the one full RLVR row is nearest to an OPD row, and near enough for a call."""
    rlvr = next(row for row in FULL if row.regime == RLVR)
    nearest = min((row for row in FULL if row != rlvr), key=lambda row: _distance(rlvr, row))
    assert nearest.regime == OPD
    assert _distance(rlvr, nearest) < FAR
    assert any("would be called OPD" in caveat for caveat in place(_as_run(rlvr)).caveats)


def test_a_run_far_from_all_is_not_called() -> None:
    placement = place(make_summary(top16_energy={"mean": 0.99}, stable_rank={"mean": 1.0}))
    assert placement.regimes == ()
    assert "none of the published" in placement.verdict


def test_a_run_between_two_regimes_names_both() -> None:
    rlvr = next(row for row in FULL if row.regime == RLVR)
    opd = min((row for row in FULL if row.regime == OPD), key=lambda row: _distance(rlvr, row))
    middle = PublishedRow(
        "middle",
        "?",
        math.sqrt(rlvr.relative_norm * opd.relative_norm),
        (rlvr.sparsity + opd.sparsity) / 2,
        (rlvr.top16_energy + opd.top16_energy) / 2,
        math.sqrt(rlvr.stable_rank * opd.stable_rank),
        None,
        None,
    )
    assert set(place(_as_run(middle)).regimes) == {OPD, RLVR}


def test_without_a_spectrum_every_row_is_compared_by_two_figures() -> None:
    placement = place(make_summary(top16_energy={"mean": None, "median": None}, stable_rank=None))
    assert {row for row, _ in placement.distances} == set(PUBLISHED)
    assert "stable rank" not in placement.why


def test_no_update_and_no_figures_are_said_plainly() -> None:
    assert "No update" in place(make_summary(relative_norm=0.0)).verdict
    assert "Not placed" in place({}).verdict
    assert place({}).distances == ()


def test_the_run_is_read_at_the_published_threshold() -> None:
    assert run_figures(make_summary(sparsity=0.5, sparsity_at={"1e-05": 0.7}))["sparsity"] == 0.7
    assert run_figures(make_summary(relative_norm=float("nan")))["relative_norm"] is None


def test_another_compare_dtype_is_a_caveat() -> None:
    summary = make_summary()
    summary["settings"]["compare_dtype"] = "fp32"
    assert any("fp32" in caveat for caveat in place(summary).caveats)
    assert not any("fp32" in caveat for caveat in place(make_summary()).caveats)


def test_published_figures_are_fractions_and_shares_sum_to_one() -> None:
    assert {row.regime for row in PUBLISHED} == {SFT, OPD, RLVR}
    for row in PUBLISHED:
        for value in (row.relative_norm, row.sparsity, row.top16_energy, row.principal_coverage):
            assert value is None or 0 < value < 1
    for share in ENERGY_SHARES:
        total = share.ffn + share.attention + share.embedding + (share.lm_head or 0) + share.other
        assert total == pytest.approx(1, abs=2e-4)
