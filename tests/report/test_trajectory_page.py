"""The page and the tables of a trajectory, from a small table made by hand."""

import io
import json
import re
from typing import Any

import polars as pl
import pytest
from rich.console import Console

from deltalens.report.trajectory import (
    print_trajectory,
    render_trajectory_html,
    trajectory_repr,
    trajectory_table,
    verdict,
)

HOSTILE = "run/</script><img src=x onerror=alert(1)>"


def made(locked: int | None = 20, similar: bool = True) -> tuple[pl.DataFrame, dict[str, Any]]:
    checkpoints, rows = [], []
    for i, step in enumerate((10, 20, 30)):
        whole: dict[str, Any] = {
            "relative_norm": 1e-3 * (i + 1),
            "sparsity": 0.9 - 0.1 * i,
            "stable_rank": {"mean": 31.0, "median": 30.0 - 5 * i},
            "stable_rank_null": {"mean": 150.0, "median": 151.0},
            "hill": {"mean": None, "median": None},
            "sim16_right_end": (0.7, 0.9, 1.0)[i] if similar else None,
            "sim16_right_end_null": 0.11 if i < 2 and similar else None,
            "sim16_right_start": (1.0, 0.8, 0.7)[i] if similar else None,
            "jaccard_end": (0.3, 0.6, 1.0)[i],
            "appeared": 0.1,
            "vanished": 0.02,
            "energy_share": {"ffn": 0.6, "attention": 0.3},
        }
        name = f"{HOSTILE}-{step}"
        checkpoints.append({"name": name, "step": step, "path": name, "global": whole, "by_role": {}})
        flat = {k: v["median"] if isinstance(v, dict) and "median" in v else v for k, v in whole.items()}
        flat.pop("energy_share")
        rows.append({"checkpoint": name, "step": step, "scope": "global", "key": "all", **flat})
        for role, share in (("ffn", 0.6), (HOSTILE, 0.4)):
            rows.append({"checkpoint": name, "step": step, "scope": "role", "key": role, "energy_share": share, **flat})
    summary = {
        "source": {"path": HOSTILE},
        "checkpoints": checkpoints,
        "settings": {"compare_dtype": "bf16"},
        "steps_from": "name",
        "locked_at": locked,
        "locked_checkpoint": None if locked is None else f"{HOSTILE}-{locked}",
        "locked_at_by_role": {"ffn": locked, "attention": None},
        "locked_above": 0.8,
        "tensors": 3,
        "parameters": 1234,
        "deltalens": "0",
        "warnings": ["a warning"],
        "skipped": [{"tensor": HOSTILE, "reason": "odd"}],
    }
    return pl.DataFrame(rows, infer_schema_length=None), summary


def test_the_page_holds_every_line_and_escapes_names():
    page = render_trajectory_html(*made())
    assert "<img" not in page
    data = json.loads(re.search(r'id="report-data">(.*?)</script>', page, re.DOTALL)[1])
    lines = {key: {trace["name"]: trace for trace in figure["data"]} for key, figure in data["figures"].items()}
    assert lines["similarity"]["right, to the end"]["y"] == [0.7, 0.9, 1.0]
    assert lines["similarity"]["right, to the end"]["x"] == [10, 20, 30]
    assert lines["similarity"]["rounding null, to the end"]["y"] == [0.11, 0.11, None]
    assert [shape.get("x0") for shape in data["figures"]["similarity"]["layout"]["shapes"]] == [0, 20]
    assert lines["rank"]["stable rank"]["y"] == [30, 25, 20]
    assert lines["masks"]["Jaccard with the final mask"]["y"] == [0.3, 0.6, 1.0]
    assert lines["masks"]["sparsity"]["y"] == pytest.approx([0.9, 0.8, 0.7])
    assert lines["energy"]["ffn"]["y"] == [0.6] * 3
    assert not any("<" in name for figure in lines.values() for name in figure)
    for key in data["figures"]:
        assert f'id="chart-{key}"' in page
    assert "a warning" in page


def test_without_a_spectrum_the_page_has_no_similarity():
    table, summary = made(locked=None, similar=False)
    page = render_trajectory_html(table, summary)
    assert 'id="chart-similarity"' not in page
    assert "cannot be said" in page
    assert "Sim₁₆ end" not in trajectory_table(summary).columns


def test_the_table_marks_where_it_locks_and_leaves_out_what_nothing_has():
    table = trajectory_table(made()[1])
    assert table.columns[0] == "step"
    assert "hill" not in table.columns
    assert [row[0] for row in table.rows] == ["10", "20", "30"]
    assert table.marked == frozenset({1})
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["st. rank"], row["Sim₁₆ end"], row["Jaccard"]) == ("30.0", "0.700", "30.0 %")
    assert (row["FFN share"], row["gone"]) == ("60.0 %", "2.00 %")


@pytest.mark.parametrize(("locked", "said"), [(20, "Locked at step 20 (67% of the last)"), (None, "Not locked before")])
def test_the_verdict(locked, said):
    summary = made(locked)[1]
    assert verdict(summary).startswith(said)
    assert said in trajectory_repr(summary)


@pytest.mark.parametrize("width", [80, 200])
def test_terminal(width):
    console = Console(width=width, record=True, file=io.StringIO())
    print_trajectory(made()[1], console)
    text = console.export_text()
    assert "Locked at step 20" in text
    assert "attention not before the end" in text
    assert "odd" in text
    assert ("FFN share" in text) == (width == 200)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
