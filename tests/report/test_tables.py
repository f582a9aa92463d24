"""Cells, tables and the terminal report."""

from __future__ import annotations

import io
import subprocess
import sys

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_fixtures import make_summary, make_tensors
from rich.console import Console

from deltalens.report import print_report, summary_repr
from deltalens.report.tables import (
    coverages,
    energy_by,
    group_table,
    headline,
    largest_table,
    number,
    percent,
    printable,
    published_table,
)


def _printed(tensors: pl.DataFrame, summary: dict, width: int = 140) -> str:
    out = io.StringIO()
    print_report(tensors, summary, Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0.0, "0 %"),
        (1.0, "100.0 %"),
        (0.79, "79.0 %"),
        (0.000951, "0.0951 %"),
        (0.99996, "99.996 %"),
        (1.5, "150.0 %"),
    ],
)
def test_percent(value: float | None, text: str) -> None:
    assert percent(value) == text


@given(st.floats(0.0, 1.0, exclude_min=True, exclude_max=True))
def test_a_share_below_one_never_reads_as_all(value: float) -> None:
    text = percent(value)
    assert not text.startswith("100")
    assert text != "0 %"


@given(st.floats(1e-3, 1e9))
def test_numbers_keep_three_digits(value: float) -> None:
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=5.1e-3)


@given(st.text())
def test_printable_leaves_nothing_that_drives_a_terminal(text: str) -> None:
    assert printable(text).isprintable()
    if text.isprintable():
        assert printable(text) == text


def test_coverages_lead_with_the_core() -> None:
    labels = [one.label for one in coverages(make_summary()["global"])]
    assert labels == [
        "low-magnitude 10 %, core",
        "principal 10 %, core",
        "low-magnitude 10 %, core, |Δ| > 0",
        "low-magnitude 10 %, all",
        "principal 10 %, all",
    ]
    ranked = coverages(
        {"principal_coverage_rank64_50pct_nonzero_core": {"pooled": 0.5}, "principal_coverage_5pct": None}
    )
    assert [one.label for one in ranked] == ["principal rank 64, 50 %, core, |Δ| > 0"]


def test_energy_shares_sum_to_one_and_survive_nulls() -> None:
    tensors, _ = make_tensors()
    shares = energy_by(tensors, "role")
    assert sum(shares.values()) == pytest.approx(1)
    ffn = tensors.filter(pl.col("role") == "ffn")["delta_energy"].sum() / tensors["delta_energy"].sum()
    assert shares["ffn"] == pytest.approx(ffn)
    assert energy_by(tensors.with_columns(pl.lit(0.0).alias("delta_energy")), "role") == {}
    assert energy_by(tensors.drop("delta_energy"), "role") == {}


def test_layers_stand_in_numeric_order() -> None:
    tensors, _ = make_tensors()
    assert [row[0] for row in group_table(tensors, make_summary(), "layer").rows] == ["2", "10", "none"]


def test_the_largest_come_first_and_undefined_ones_last() -> None:
    tensors, _ = make_tensors()
    tensors = tensors.with_columns(
        pl.when(pl.col("name") == "model.norm.weight").then(None).otherwise("relative_norm").alias("relative_norm")
    )
    rows = largest_table(tensors, None).rows
    assert rows[-1][0] == "model.norm.weight"
    best = tensors.sort("relative_norm", descending=True, nulls_last=True)["name"].to_list()
    assert [row[0] for row in largest_table(tensors).rows] == best[:10]


def test_the_run_stands_first_then_the_nearest() -> None:
    table = published_table(make_summary())
    assert table.rows[0][0] == "this run"
    distances = [row[-1] for row in table.rows[1:] if row[-1] != "–"]
    assert distances == sorted(distances, key=float)
    assert table.rows[1][0] == "DS-Qwen OPD (JustRL teacher)"
    assert table.rows[-1][0] == "JustRL RLVR"  # lacks two of the four figures


def test_headline_puts_chance_beside_the_number() -> None:
    tensors, _ = make_tensors()
    beside = {label: text for label, _, text in headline(make_summary(stable_rank_null={"mean": 155.0}), tensors)}
    assert "rounding null 155" in beside["stable rank"]
    assert "Gaussian" in beside["stable rank"]
    assert beside["low-magnitude coverage, core"].startswith("rounding null 31.6 %, random 10.0 %, excess 1.006")


@pytest.mark.parametrize("width", [80, 140])
def test_terminal_report_shows_each_part(width: int) -> None:
    tensors, _ = make_tensors()
    text = _printed(tensors, make_summary(), width)
    assert max(len(line) for line in text.splitlines()) <= width
    for part in ("Coverage of the masks", "rounding null", "By role", "moved most", "published", "Looks like OPD"):
        assert part in text
    for part in ("Warnings: 1", "may> be another model", "Skipped: 1", "inv_freq<i>", "princ. ×"):
        assert part in text


def test_names_are_neither_markup_nor_control_sequences() -> None:
    tensors, _ = make_tensors()
    tensors = tensors.with_columns(pl.lit("a[red]b[0]\x1b[2J").alias("name"))
    text = _printed(tensors, make_summary())
    assert "\x1b" not in text
    assert "a[red]b[0]\\x1b[2J" in text


def test_nothing_but_names_is_enough() -> None:
    """A run with `--spectrum none` and no metrics left: no traceback, no empty tables."""
    bare = pl.DataFrame({"name": ["w"], "layer": [None], "role": ["other"], "module": ["w"]})
    text = _printed(bare, {"schema": 1, "global": {}})
    assert "Not placed" in text
    assert "By role" not in text
    assert "? → ?" in summary_repr({})


def test_long_lists_are_counted() -> None:
    tensors, _ = make_tensors()
    summary = make_summary()
    summary["warnings"] = [f"warning {at}" for at in range(9)]
    assert "and 4 more" in _printed(tensors, summary)


def test_repr_is_a_few_lines_that_lead_with_the_core() -> None:
    text = summary_repr(make_summary())
    assert len(text.splitlines()) < 12
    assert "low-magnitude coverage, core: 31.8 % (rounding null 31.6 %" in text
    assert "coverage, all" not in text


def test_a_terminal_report_loads_no_plotting() -> None:
    code = (
        "import sys, deltalens.report.terminal, deltalens.report.html, deltalens.report as r; r.print_report;"
        "bad = {'plotly', 'jinja2', 'torch'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
