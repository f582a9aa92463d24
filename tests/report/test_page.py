"""The page: self-contained, safe against hostile names, and true to the tables."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest
from report_fixtures import HOSTILE, make_summary, make_tensors

from deltalens.report import plots, render_html, write_html


class _Page(HTMLParser):
    """Elements by name, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.data = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = "data" if dict(attrs).get("id") == "report-data" else tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data += data
        elif self._inside not in ("script", "style"):
            self.text.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    tensors, spectra = make_tensors()
    return render_html(tensors, spectra, make_summary())


def test_one_file_with_plotly_once_and_nothing_fetched(page: str) -> None:
    parsed = _Page(page)
    assert page.count("* plotly.js v") == 1
    assert not [tag for tag, _ in parsed.tags if tag in ("link", "img", "iframe", "base")]
    assert not [attrs for tag, attrs in parsed.tags if tag == "script" and "src" in attrs]
    links = [attrs.get("href") or "" for tag, attrs in parsed.tags if tag == "a"]
    assert links
    assert all(link.startswith("#") for link in links)
    policy = next(attrs["content"] for tag, attrs in parsed.tags if attrs.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert len(page) < 6_500_000


def test_hostile_names_stay_text(page: str) -> None:
    parsed = _Page(page)
    assert "onerror=alert" in "".join(parsed.text)  # shown, as text
    assert "</script><img" not in page
    assert "<b>student" not in page
    assert "<may>" not in page
    assert "<i>: only" not in page
    # Three scripts, the last one ours: no name has ended one early.
    assert len([tag for tag, _ in parsed.tags if tag == "script"]) == 3
    assert not re.search(r"[<>&]", parsed.data)


def test_plotly_texts_are_inert(page: str) -> None:
    """Plotly reads <b>, <a href> in its texts: names reach it with entities, which it shows as characters."""
    data = json.loads(_Page(page).data)
    trace = data["heatmap"]["metrics"]["relative_norm"]["trace"]
    assert any("&lt;/script&gt;" in module for module in trace["y"])
    assert not any("<" in module for module in trace["y"])
    assert HOSTILE in data["spectra"]["names"]


def test_every_figure_is_one_that_plotly_knows(page: str) -> None:
    data = json.loads(_Page(page).data)
    assert set(data["figures"]) == {"published", "coverage", "energy"}
    for figure in data["figures"].values():
        go.Figure(figure)  # raises on an unknown property
    for entry in data["heatmap"]["metrics"].values():
        go.Figure({"data": [entry["trace"]], "layout": data["heatmap"]["layout"]})
    go.Figure({"data": [], "layout": data["spectra"]["layout"]})


def test_heatmap_cells_are_the_tensors_values() -> None:
    tensors, _ = make_tensors()
    grid = plots.heatmap(tensors)
    assert grid is not None
    trace = grid["metrics"]["relative_norm"]["trace"]
    assert trace["x"] == ["0", "1", "2", "none"]
    for row in tensors.iter_rows(named=True):
        layer = "none" if row["layer"] is None else str(row["layer"])
        value = trace["z"][trace["y"].index(plots.label(row["module"]))][trace["x"].index(layer)]
        assert value == pytest.approx(100 * row["relative_norm"], rel=1e-4)
    still = grid["metrics"]["stable_rank"]["trace"]
    assert still["z"][still["y"].index("down_proj")][2] is None  # a zero update has no rank
    excess = grid["metrics"]["low_magnitude_coverage_10pct_excess"]["trace"]
    assert (excess["zmin"] + excess["zmax"]) / 2 == pytest.approx(1)


def test_a_cell_of_several_tensors_is_their_mean_and_towers_stay_apart() -> None:
    tensors = pl.DataFrame(
        {
            "name": ["e[0]", "e[1]", "v"],
            "layer": [0, 0, 0],
            "module": ["up_proj"] * 3,
            "role": ["ffn", "ffn", "vision.ffn"],
            "relative_norm": [0.01, 0.03, 0.5],
        }
    )
    grid = plots.heatmap(tensors)
    assert grid is not None
    trace = grid["metrics"]["relative_norm"]["trace"]
    assert dict(zip(trace["y"], trace["z"], strict=True)) == {"up_proj": [2.0], "vision: up_proj": [50.0]}


def test_spectra_are_thinned_with_their_ends_kept() -> None:
    tensors, spectra = make_tensors()
    curves = plots.spectra_curves(tensors, spectra.sample(fraction=1.0, shuffle=True, seed=1))
    assert curves is not None
    place = curves["names"].index("model.layers.1.q_proj.weight")
    curve = curves["curves"][place]
    values = spectra.filter((pl.col("name") == "model.layers.1.q_proj.weight") & (pl.col("which") == "delta"))
    full = values.sort("index")["value"].to_list()
    assert len(curve["index"]) <= plots.CURVE_POINTS < len(full)
    assert (curve["index"][0], curve["index"][-1]) == (1, len(full))
    assert curve["delta"] == pytest.approx([full[at - 1] for at in curve["index"]], rel=1e-4)
    # Δ of the fixture is Gaussian: the reference lies on it.
    assert curve["gaussian"][:20] == pytest.approx(curve["delta"][:20], rel=0.1)


def test_spectra_with_zeros_and_without_shapes() -> None:
    tensors = pl.DataFrame({"name": ["w"], "shape": ["3x4"]})
    spectra = pl.DataFrame({"name": ["w"] * 3, "which": ["delta"] * 3, "index": [0, 1, 2], "value": [1.0, 1e-17, 0.0]})
    curves = plots.spectra_curves(tensors, spectra)
    assert curves is not None
    assert curves["curves"][0]["delta"] == [1.0, None, None]
    bare = plots.spectra_curves(pl.DataFrame({"name": ["w"]}), spectra)
    assert bare is not None
    assert bare["curves"][0]["gaussian"] is None
    assert plots.spectra_curves(tensors, None) is None


def test_many_curves_are_cut_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, spectra = make_tensors()
    monkeypatch.setattr(plots, "MAX_CURVES", 2)
    curves = plots.spectra_curves(tensors, spectra)
    assert curves is not None
    assert len(curves["curves"]) == 2
    assert curves["dropped"] == spectra["name"].n_unique() - 2
    energies = dict(tensors.select("name", "delta_energy").iter_rows())
    best = max(energies, key=lambda name: energies[name])
    assert curves["names"][0] == best


@pytest.mark.parametrize(("m", "n"), [(400, 400), (200, 800), (900, 150)])
def test_gaussian_singular_values_against_a_draw(m: int, n: int) -> None:
    drawn = np.linalg.svd(np.random.default_rng(0).normal(size=(m, n)), compute_uv=False)
    drawn /= np.linalg.norm(drawn)
    expected = plots.gaussian_singular_values(m, n)
    assert expected.shape == (min(m, n),)
    assert np.linalg.norm(expected) == pytest.approx(1)
    assert expected == pytest.approx(drawn, abs=0.02 * drawn[0])
    assert (np.diff(expected) <= 0).all()


def test_coverage_bars_show_seen_null_and_excess() -> None:
    figure = plots.coverage_bars(make_summary())
    assert figure is not None
    seen, null, random, above = figure["data"]
    assert seen["x"][0] == "low-magnitude<br>core"
    assert (seen["y"][0], null["y"][0], random["y"][0]) == (31.8, 31.6, 10.0)
    assert above["text"][0] == "× 1.006 [0.996, 1.016]"
    assert plots.coverage_bars({"global": {}}) is None


def test_energy_bars_add_up_for_this_run() -> None:
    shares = {"ffn": 0.6, "attention": 0.2, "embedding": 0.05, "lm_head": None, "norm": 0.05, "vision": 0.1}
    figure = plots.energy_bars(make_summary(energy_share=shares))
    assert figure is not None
    assert sum(trace["x"][0] for trace in figure["data"]) == pytest.approx(100)
    assert plots.energy_bars(make_summary(energy_share={"ffn": None})) is None


def test_the_run_is_inside_the_scatter_however_small() -> None:
    figure = plots.published_scatter(make_summary(relative_norm=1e-7))
    assert figure["layout"]["xaxis"]["range"][0] < -5
    assert figure["data"][-1]["name"] == "this run"
    still = plots.published_scatter(make_summary(relative_norm=0.0))
    assert "this run" not in [trace["name"] for trace in still["data"]]


def test_a_page_without_spectra_metrics_or_summary_still_reads() -> None:
    bare = pl.DataFrame({"name": ["w"], "layer": [None], "role": ["other"], "module": ["w"], "relative_norm": [None]})
    page = render_html(bare, None, {"schema": 1})
    text = "".join(_Page(page).text)
    assert "Not placed" in text
    assert "Singular values" not in text
    empty = pl.DataFrame(schema={"name": pl.String, "layer": pl.Int64, "role": pl.String, "module": pl.String})
    assert "Not placed" in render_html(empty, None, {})


def test_infinities_never_reach_the_page() -> None:
    tensors, spectra = make_tensors()
    tensors = tensors.with_columns(pl.lit(float("inf")).alias("stable_rank"), pl.lit(float("nan")).alias("hill"))
    data = _Page(render_html(tensors, spectra, make_summary(stable_rank={"mean": float("nan")}))).data
    assert not re.search(r"NaN|Infinity", data)
    assert "stable_rank" not in json.loads(data)["heatmap"]["metrics"]


def test_the_file_is_written_whole(tmp_path: Path, page: str) -> None:
    tensors, spectra = make_tensors()
    write_html(tmp_path / "deep" / "report.html", tensors, spectra, make_summary())
    assert (tmp_path / "deep" / "report.html").read_text(encoding="utf-8") == page
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["report.html"]
