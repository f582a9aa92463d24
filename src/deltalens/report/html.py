"""The report as one HTML file that needs nothing else: no network, no other files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from deltalens.files import whole_file
from deltalens.report import plots
from deltalens.report.regime import place
from deltalens.report.tables import (
    coverage_table,
    group_table,
    headline,
    largest_table,
    printable,
    published_table,
)

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

__all__ = ["load_page", "page_assets", "render_html", "script_json", "template_environment", "write_html"]

_PAGE = "report.html.j2"
_MAX_ROWS = 2000  # tensors listed in full on the page; tensors.parquet has them all


def render_html(tensors: pl.DataFrame, spectra: pl.DataFrame | None, summary: Mapping[str, Any]) -> str:
    """The whole page as text.

    `tensors` has a row a tensor, `spectra` the columns name, which, index, value, `summary` is schema 1. Any column
    or key may be absent or null: what cannot be shown is left out. Everything from the checkpoints is escaped.
    """
    placement = place(summary)
    grid = plots.heatmap(tensors)
    curves = plots.spectra_curves(tensors, spectra)
    figures = {
        "published": plots.published_scatter(summary),
        "coverage": plots.coverage_bars(summary),
        "energy": plots.energy_bars(summary),
    }
    data = {"figures": {key: figure for key, figure in figures.items() if figure}, "heatmap": grid, "spectra": curves}
    return (
        template_environment()
        .get_template(_PAGE)
        .render(
            **page_assets(),
            data=script_json(data),
            charts=data,
            sides=[_side(summary, "source"), _side(summary, "trained")],
            overall=summary.get("global") or {},
            settings={
                printable(key): printable(_setting(value)) for key, value in (summary.get("settings") or {}).items()
            },
            version=printable(summary.get("deltalens", "")),
            headline=headline(summary, tensors),
            placement=placement,
            metrics=[(key, entry["title"]) for key, entry in grid["metrics"].items()] if grid else [],
            published=published_table(summary, placement),
            coverage=coverage_table(summary.get("global") or {}),
            roles=group_table(tensors, summary, "role"),
            layers=group_table(tensors, summary, "layer"),
            largest=largest_table(tensors),
            everything=largest_table(tensors, _MAX_ROWS),
            tensors=tensors.height,
            warnings=[printable(warning) for warning in summary.get("warnings") or ()],
            skipped=[(printable(e["tensor"]), printable(e["reason"])) for e in summary.get("skipped") or ()],
        )
    )


def write_html(path: Path, tensors: pl.DataFrame, spectra: pl.DataFrame | None, summary: Mapping[str, Any]) -> None:
    """Write the page to `path`, whole or not at all."""
    page = render_html(tensors, spectra, summary)
    with whole_file(path) as partial:
        partial.write_text(page, encoding="utf-8")


def load_page() -> None:
    """Load and compile what `render_html` needs, so that it does not have to."""
    page_assets()
    template_environment().get_template(_PAGE)


@cache
def template_environment() -> jinja2.Environment:
    """The pages' templates: everything escaped, and an error for what a template names and is not given."""
    import jinja2  # here, as plotly below: both are slow to import and a terminal report needs neither

    return jinja2.Environment(
        loader=jinja2.PackageLoader("deltalens.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def page_assets() -> dict[str, Markup]:
    """`css`, `script` and `plotly` of a page, to be put in as they are."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = template_environment()
    assert environment.loader is not None
    style, script = (environment.loader.get_source(environment, name)[0] for name in ("report.css", "report.js"))
    return {"css": Markup(style), "script": Markup(script), "plotly": Markup(get_plotlyjs())}


def script_json(data: object) -> Markup:
    """JSON that may stand inside a script element: no character of it can end the element or open a comment."""
    from markupsafe import Markup

    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _side(summary: Mapping[str, Any], side: str) -> dict[str, str]:
    entry = summary.get(side) or {}
    parameters = entry.get("parameters")
    return {
        "name": side,
        "path": printable(entry.get("path", "?")),
        "format": printable(entry.get("format", "?")),
        "parameters": f"{parameters:,}" if isinstance(parameters, int) else "–",
    }


def _setting(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(one) for one in value) or "–"
    return "–" if value is None else str(value)
