"""The comparison's page and terminal tables: self-contained, safe against hostile names, the right way round."""

import io
import json
import re

import plotly.graph_objects as go
import polars as pl
import pytest
from rich.console import Console

from deltalens.analysis.compare_summary import pair_rows, pooled_rows, tensor_rows
from deltalens.report.compare import compare_repr, matrix, print_compare, render_compare_html

HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[31m"


def make_tables(names: tuple[str, ...], draws: int = 2) -> tuple[pl.DataFrame, pl.DataFrame, dict]:
    """Tables of a comparison as `compare` makes them, from invented counts."""
    rows = []
    for layer in (None, 0, 1):
        for module, shape in (
            (("q_proj", "40x40"), ("norm", "40")) if layer is not None else (("embed_tokens", "60x40"),)
        ):
            size = 1600 if "x" in shape else 40
            pairs = []
            for at in range(len(names) * (len(names) - 1) // 2):
                both = size // (8 + at)
                one = {
                    "visible": both, "visible_same": both // 2, "nonzero": both, "nonzero_same": both // 2, "dot": 1e-6,
                    "moments": [both * 1e-4, both * 2e-4, both * 2e-8, both * 5e-8, both * 2.5e-8],
                    "expected": 0.9 * both, "expected_nonzero": None, "expected_moments": None,
                }  # fmt: skip
                if "x" in shape:
                    one |= {"sim_left": 0.5, "sim_right": 0.6 + 0.01 * at, "sim_rank": 16}
                    one |= {"sim_left_draws": [0.41, 0.42][:draws], "sim_right_draws": [0.43, 0.44][:draws]}
                pairs.append(one)
            rows.append(
                {
                    "name": f"model.layers.{layer}.{module}{HOSTILE}", "layer": layer, "module": module + HOSTILE,
                    "role": {"q_proj": "attention", "norm": "norm"}.get(module, "embedding"), "shape": shape,
                    "parameters": size, "visible": [size // (i + 2) for i in range(len(names))],
                    "nonzero": [size // (i + 2) for i in range(len(names))], "delta_energy": [1e-4] * len(names),
                    "nonfinite_count": 0, "pairs": pairs,
                }
            )  # fmt: skip
    pooled = pooled_rows(rows, names, 0)
    summary = {
        "schema": 1, "deltalens": "0", "source": {"path": "base" + HOSTILE}, "tensors": 5, "parameters": 5680,
        "runs": [{"name": n, "path": f"/runs/{n}", "density": 0.3, "density_nonzero": 0.4} for n in names],
        "settings": {"threshold": 1e-5, "compare_dtype": "bf16"}, "pairs": pair_rows(pooled),
        "skipped": [{"tensor": "x" + HOSTILE, "reason": "only in SOURCE"}], "warnings": ["beware " + HOSTILE],
    }  # fmt: skip
    return pl.DataFrame(pooled), pl.DataFrame(tensor_rows(rows, names)), summary


NAMES = ("one", "two" + HOSTILE, "three")


@pytest.fixture(scope="module")
def tables():
    return make_tables(NAMES)


@pytest.fixture(scope="module")
def page(tables) -> str:
    return render_compare_html(*tables)


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="report-data">(.*?)</script>', page, re.DOTALL).group(1))


def test_one_file_that_fetches_nothing_and_runs_nothing_of_a_names(page):
    assert "default-src 'none'" in page
    assert page.count("Plotly.react") >= 1
    assert "<img src=x" not in page
    assert "\x1b" not in page
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=\"(?!#)", outside)


def test_plotly_accepts_every_figure(page):
    data = data_of(page)
    for figure in data["figures"].values():
        go.Figure(figure)  # raises for a property that plotly does not know
    for entry in data["heatmap"]["metrics"].values():
        go.Figure({"data": [entry["trace"]], "layout": data["heatmap"]["layout"]})


def test_matrices_read_row_in_column(tables, page):
    _, _, summary = tables
    values = matrix(summary, "a_in_b")
    pair = summary["pairs"][1]  # one, three
    assert (values[0][2], values[2][0]) == (pair["a_in_b"], pair["b_in_a"])
    assert values[0][0] is None
    assert matrix(summary, "a_in_b_random")[2][0] == pair["b_in_a_random"]
    assert matrix(summary, "sim16_right")[0][2] == matrix(summary, "sim16_right")[2][0] == pair["sim16_right"]
    assert matrix(summary, "a_in_b", core=True)[0][2] == pair["core"]["a_in_b"] != pair["a_in_b"]
    trace = data_of(page)["figures"]["a_in_b"]["data"][0]
    assert trace["z"][0][2] == pytest.approx(100 * pair["a_in_b"])
    assert trace["x"] == trace["y"]


def test_heatmaps_of_every_pair(tables, page):
    tensors = tables[1]
    grid = data_of(page)["heatmap"]
    assert set(re.findall(r'<option value="([^"]+)"', page)) == set(grid["metrics"])
    assert {key.split(":")[0] for key in grid["metrics"]} == {"0", "1", "2"}
    trace = grid["metrics"]["2:sim16_right"]["trace"]
    want = tensors.filter((pl.col("a") == NAMES[1]) & (pl.col("layer") == 1) & pl.col("sim16_right").is_not_null())
    row = next(i for i, name in enumerate(trace["y"]) if name.startswith("q_proj"))
    assert trace["z"][row][trace["x"].index("1")] == pytest.approx(want["sim16_right"].item(), rel=1e-4)
    assert grid["metrics"]["0:a_in_b_excess"]["trace"]["zmin"] < 1 < grid["metrics"]["0:a_in_b_excess"]["trace"]["zmax"]


def test_no_number_without_what_chance_and_rounding_give(tables, page):
    _, _, summary = tables
    pair = summary["pairs"][0]
    for value in (pair["a_in_b"], pair["a_in_b_random"], pair["a_in_b_null"], pair["b_in_a"]):
        assert f"{100 * value:#.3g} %" in page
    assert f"{pair['a_in_b_excess']:.3f} [" in page
    assert "0.435 ± 0.007" in page  # the simulated null of Sim_16, with its deviation


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("runs", [2, 3])
def test_terminal(width, runs):
    pairs, _, summary = make_tables(NAMES[:runs])
    stream = io.StringIO()
    print_compare(pairs, summary, Console(file=stream, width=width))
    text = stream.getvalue()
    assert "\x1b[31m" not in text
    assert "over null" in text
    assert ("by role" in text) == (runs == 2)
    assert ("Share of the row's updates" in text) == (runs == 3)
    assert "beware" in text
    assert max(map(len, text.splitlines())) <= width


def test_repr_and_nothing_simulated():
    pairs, tensors, summary = make_tables(("a", "b"), draws=0)
    assert "a in b: " in compare_repr(summary)
    assert summary["pairs"][0]["sim16_right_null"] is None
    assert summary["pairs"][0]["a_in_b_nonzero_excess"] is None
    assert "null" not in data_of(render_compare_html(pairs, tensors, summary))["figures"].get("sim16_right_null", {})
