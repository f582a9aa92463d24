"""The page's figures as plain plotly JSON: traces and layouts made from the tables, styled by the page itself.

Every string that comes from a checkpoint goes through `label`, since plotly reads a subset of HTML in its texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape
from typing import Any

import numpy as np
import polars as pl

from deltalens.report.published import ENERGY_SHARES, OPD, PUBLISHED, RLVR, SFT
from deltalens.report.regime import run_figures
from deltalens.report.tables import coverages, excess, number, percent, printable

__all__ = [
    "CURVE_POINTS",
    "MAX_CURVES",
    "MAX_MODULES",
    "coverage_bars",
    "diverging",
    "energy_bars",
    "gaussian_singular_values",
    "heatmap",
    "label",
    "published_scatter",
    "spectra_curves",
]

MAX_CURVES = 300  # tensors whose spectrum the page holds
CURVE_POINTS = 48  # points kept of a spectrum, spread evenly over the logarithm of the index
MAX_MODULES = 60  # lines of the heatmap

BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#3b7dd8", "#e08a1e", "#2a9d6f", "#9a6fd0", "#d1495b", "#8a8f98"

# (column, label, as a percentage, centre of a diverging scale)
_HEATMAP_METRICS: tuple[tuple[str, str, bool, float | None], ...] = (
    ("relative_norm", "relative norm", True, None),
    ("sparsity", "sparsity", True, None),
    ("unchanged_fraction", "unchanged fraction", True, None),
    ("top_energy_1pct", "energy in the largest 1 % of coordinates", True, None),
    ("stable_rank", "stable rank", False, None),
    ("effective_rank", "effective rank", False, None),
    ("top16_energy", "top-16 energy", True, None),
    ("hill", "Hill index of the singular values", False, None),
    ("principal_projection_10pct", "principal projection, 10 %", True, None),
    ("low_magnitude_coverage_10pct", "low-magnitude coverage, 10 %", True, None),
    ("low_magnitude_coverage_10pct_excess", "low-magnitude coverage over the rounding null", False, 1.0),
    ("principal_coverage_10pct", "principal coverage, 10 %", True, None),
    ("principal_coverage_10pct_excess", "principal coverage over the rounding null", False, 1.0),
    ("rotation_10pct", "rotation of the top left subspace, 10 %", False, None),
    ("spectral_shift", "spectral shift", False, None),
)
_DIVERGING = [[0.0, "#2166ac"], [0.5, "#f2f2f2"], [1.0, "#b2182b"]]
_OUTSIDE = "none"


def label(text: object) -> str:
    """Text from a checkpoint, made inert for plotly's pseudo-HTML."""
    return escape(printable(str(text)), quote=True)


def heatmap(
    tensors: pl.DataFrame, metrics: Sequence[tuple[str, str, bool, float | None]] = _HEATMAP_METRICS
) -> dict[str, Any] | None:
    """Layer × module: one plotly trace a metric; a cell is the mean over its tensors. None without tensors.

    `metrics`: (column, label, whether it is a percentage, the centre of a diverging scale or None).
    """
    if tensors.is_empty() or not {"layer", "module"} <= set(tensors.columns):
        return None
    rows = list(tensors.iter_rows(named=True))
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    energy: dict[str, float] = {}
    for row in rows:
        tower = "vision: " if str(row.get("role") or "").startswith("vision") else ""
        module = tower + printable(row["module"] or row.get("name") or "?")
        layer = _OUTSIDE if row["layer"] is None else str(row["layer"])
        cells.setdefault((module, layer), []).append(row)
        energy[module] = energy.get(module, 0.0) + (_finite(row.get("delta_energy")) or 0.0)
    modules = sorted(energy, key=lambda module: -energy[module])[:MAX_MODULES]
    layers = sorted(
        {layer for _, layer in cells}, key=lambda layer: (layer == _OUTSIDE, int(layer) if layer != _OUTSIDE else 0)
    )
    traces = {}
    for column, title, as_percent, centre in metrics:
        if column not in tensors.columns:
            continue
        text = percent if as_percent else number
        scale = 100.0 if as_percent else 1.0
        values = [[_mean_of(cells.get((module, layer), ()), column) for layer in layers] for module in modules]
        if all(value is None for line in values for value in line):
            continue
        chance = [
            [_mean_of(cells.get((module, layer), ()), f"{column}_random") for layer in layers] for module in modules
        ]
        hover = [
            [
                text(value) + (f" (random {text(other)})" if other is not None else "")
                for value, other in zip(*lines, strict=True)
            ]
            for lines in zip(values, chance, strict=True)
        ]
        trace: dict[str, Any] = {
            "type": "heatmap",
            "x": layers,
            "y": [label(module) for module in modules],
            "z": [[_short(None if value is None else scale * value) for value in line] for line in values],
            "customdata": hover,
            "hovertemplate": "%{y}, layer %{x}<br>%{customdata}<extra></extra>",
            "hoverongaps": False,
            "colorscale": "Cividis",
            "colorbar": {"title": {"text": "%" if as_percent else ""}, "thickness": 14},
            "xgap": 1,
            "ygap": 1,
        }
        if centre is not None:
            trace |= diverging(values, centre)
        traces[column] = {"title": title, "trace": trace}
    if not traces:
        return None
    return {
        "metrics": traces,
        "dropped": len(energy) - len(modules),
        "layout": {
            "height": 200 + 26 * len(modules),
            "margin": {"l": 10, "r": 10, "t": 40, "b": 50},
            "xaxis": {"title": {"text": "layer"}, "type": "category", "automargin": True, "showgrid": False},
            "yaxis": {"type": "category", "autorange": "reversed", "automargin": True, "showgrid": False},
        },
    }


def diverging(values: Sequence[Sequence[float | None]], centre: float) -> dict[str, Any]:
    """A colour scale with its middle at `centre`, wide enough for all values."""
    spread = max((abs(v - centre) for line in values for v in line if v is not None), default=0.0)
    return {"colorscale": _DIVERGING, "zmin": centre - max(spread, 0.05), "zmax": centre + max(spread, 0.05)}


def coverage_bars(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Seen, rounding null and random for every 10 % coverage of visible updates, the excess written above."""
    found = [one for one in coverages(summary.get("global") or {}) if one.ratio == "10" and not one.nonzero]
    found = [one for one in found if one.seen is not None]
    if not found:
        return None
    names = [one.label.replace(" 10 %", "").replace(", ", "<br>") for one in found]
    texts = ["" if one.excess is None else f"× {excess(one)}" for one in found]
    bars = (
        ("seen", [one.seen for one in found], BLUE),
        ("rounding null", [one.null for one in found], ORANGE),
        ("random", [one.random for one in found], GREY),
    )
    traces: list[dict[str, Any]] = []
    for name, values, colour in bars:
        trace: dict[str, Any] = {
            "type": "bar",
            "name": name,
            "x": names,
            "y": [_short(None if value is None else 100 * value) for value in values],
            "marker": {"color": colour},
            "hovertemplate": f"{name}: %{{y:.3~g}} %<extra></extra>",
        }
        traces.append(trace)
    tops = [max(value or 0.0 for value in (one.seen, one.null, one.random)) for one in found]
    traces.append(
        {
            "type": "scatter",
            "mode": "text",
            "x": names,
            "y": [_short(100 * top) for top in tops],
            "text": texts,
            "textposition": "top center",
            "hoverinfo": "skip",
            "showlegend": False,
            "cliponaxis": False,
        }
    )
    layout = {
        "barmode": "group",
        "height": 420,
        "margin": {"l": 60, "r": 10, "t": 40, "b": 70},
        "yaxis": {"title": {"text": "share of the visible updates, %"}, "range": [0, max(112 * max(tops), 1.0)]},
        "xaxis": {"tickangle": 0},
        "legend": _LEGEND_ABOVE,
    }
    return {"data": traces, "layout": layout}


def energy_bars(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Share of the update's energy by module kind, this run above the published ones."""
    run = (summary.get("global") or {}).get("energy_share") or {}
    if not any(run.values()):
        return None
    kinds = (
        ("ffn", "FFN", BLUE),
        ("attention", "attention", ORANGE),
        ("embedding", "embedding", GREEN),
        ("lm_head", "LM head", PURPLE),
        ("other", "other", GREY),
    )
    named = {key for key, _, _ in kinds[:-1]}
    own = {key: run.get(key) or 0.0 for key in named}
    own["other"] = sum(value or 0.0 for key, value in run.items() if key not in named)
    names = ["<b>this run</b>", *(row.name for row in ENERGY_SHARES)]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": title,
            "y": names,
            "x": [_short(100 * value) for value in (own[key], *((getattr(row, key) or 0.0) for row in ENERGY_SHARES))],
            "marker": {"color": colour},
            "hovertemplate": f"%{{y}}<br>{title}: %{{x:.3~g}} %<extra></extra>",
        }
        for key, title, colour in kinds
    ]
    layout = {
        "barmode": "stack",
        "height": 360,
        "margin": {"l": 10, "r": 10, "t": 40, "b": 50},
        "yaxis": {"autorange": "reversed", "automargin": True},
        "xaxis": {"title": {"text": "share of ‖Δ‖², %"}, "range": [0, 100.5]},
        "legend": {**_LEGEND_ABOVE, "traceorder": "normal"},
    }
    return {"data": traces, "layout": layout}


def published_scatter(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Relative norm (log) against sparsity: the published rows by regime, and this run where it has both."""
    looks = {SFT: (RED, "square"), OPD: (BLUE, "circle"), RLVR: (ORANGE, "diamond")}
    beside = {  # where a label does not lie on another point's
        "DS-Qwen OPD": "middle left", "Qwen3-1.7B OPD": "middle left", "DS-Qwen OPD (JustRL teacher)": "middle left",
        "MiniCPM OPD": "top right", "Qwen-Math offline distillation": "middle left",
    }  # fmt: skip
    traces: list[dict[str, Any]] = []
    for regime, (colour, symbol) in looks.items():
        rows = [row for row in PUBLISHED if row.regime == regime]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "name": regime,
                "x": [_short(100 * row.relative_norm) for row in rows],
                "y": [_short(100 * row.sparsity) for row in rows],
                "text": [row.name for row in rows],
                "textposition": [beside.get(row.name, "middle right") for row in rows],
                "textfont": {"size": 10},
                "marker": {"color": colour, "symbol": symbol, "size": 10},
                "hovertemplate": "%{text}<br>relative norm %{x:.3~g} %<br>sparsity %{y:.3~g} %<extra></extra>",
            }
        )
    run = run_figures(summary)
    extent = [-2.0, 1.4]  # log₁₀ of percent: the published points and room for their labels
    if run["relative_norm"] and run["sparsity"] is not None:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "this run",
                "x": [_short(100 * run["relative_norm"])],
                "y": [_short(100 * run["sparsity"])],
                "marker": {"color": GREEN, "symbol": "star", "size": 18, "line": {"width": 1, "color": "#ffffff"}},
                "hovertemplate": "this run<br>relative norm %{x:.3~g} %<br>sparsity %{y:.3~g} %<extra></extra>",
            }
        )
        own = math.log10(100 * run["relative_norm"])
        extent = [min(extent[0], own - 0.2), max(extent[1], own + 0.2)]
    layout = {
        "height": 560,
        "margin": {"l": 60, "r": 20, "t": 40, "b": 60},
        "xaxis": {
            "title": {"text": "relative norm ‖Δ‖ / ‖W‖, %"},
            "type": "log",
            "tickformat": "~g",
            "dtick": "D2",
            "range": extent,
        },
        "yaxis": {"title": {"text": "sparsity at 1e-5, %"}, "range": [-1, 101]},
        "legend": _LEGEND_ABOVE,
    }
    return {"data": traces, "layout": layout}


def spectra_curves(tensors: pl.DataFrame, spectra: pl.DataFrame | None) -> dict[str, Any] | None:
    """Singular values of Δ, of the source, and of a Gaussian update of Δ's shape and norm, thinned for the page.

    The tensors with the most update energy come first; `dropped` counts those left out beyond `MAX_CURVES`.
    """
    if spectra is None or spectra.is_empty():
        return None
    order = tensors
    if "delta_energy" in tensors.columns:
        order = tensors.sort("delta_energy", descending=True, nulls_last=True)
    shapes = dict(order.select("name", "shape").iter_rows()) if "shape" in order.columns else {}
    grouped = spectra.group_by("name", "which", maintain_order=True).agg(pl.col("value").sort_by("index"))
    values: dict[str, dict[str, list[float]]] = {}
    for name, which, series in grouped.iter_rows():
        values.setdefault(name, {})[which] = series
    names = [name for name in order["name"] if name in values]
    names += [name for name in values if name not in shapes]
    curves = []
    for name in names[:MAX_CURVES]:
        kinds = values[name]
        longest = max((len(series) for series in kinds.values()), default=0)
        index = _thin(longest)
        curve: dict[str, Any] = {"index": (index + 1).tolist()}
        for which in ("delta", "source"):
            curve[which] = _positive(kinds.get(which), index)
        delta = np.asarray(kinds.get("delta") or [], dtype=float)
        shape = _matrix_shape(shapes.get(name), len(delta))
        norm = float(np.linalg.norm(delta)) if delta.size and np.isfinite(delta).all() else 0.0
        curve["gaussian"] = None
        if shape is not None and norm > 0:
            curve["gaussian"] = [_short(value) for value in gaussian_singular_values(*shape)[index] * norm]
        curves.append(curve)
    return {
        "names": [printable(name) for name in names[:MAX_CURVES]],
        "curves": curves,
        "dropped": max(0, len(names) - MAX_CURVES),
        "colours": {"delta": BLUE, "source": GREY, "gaussian": ORANGE},
        "layout": {
            "height": 460,
            "margin": {"l": 70, "r": 20, "t": 40, "b": 60},
            "xaxis": {
                "title": {"text": "index of the singular value"},
                "type": "log",
                "tickformat": "~g",
                "dtick": "D2",
            },
            "yaxis": {"title": {"text": "singular value"}, "type": "log", "exponentformat": "power", "dtick": 1},
            "legend": _LEGEND_ABOVE,
        },
    }


@lru_cache(maxsize=64)
def gaussian_singular_values(m: int, n: int) -> np.ndarray:
    """Singular values to expect of an m × n Gaussian matrix of Frobenius norm 1: float64, (min(m, n),), descending.

    Quantiles of the Marchenko–Pastur law (Marchenko and Pastur 1967), exact for large matrices.
    """
    small, large = min(m, n), max(m, n)
    beta = small / large
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # λ = mid − half·cos θ removes the square-root ends of the density, so the plain sum below converges fast.
    theta = (np.arange(20_000) + 0.5) * math.pi / 20_000
    eigen = (low + high) / 2 - (high - low) / 2 * np.cos(theta)
    weight = np.sqrt(np.maximum((high - eigen) * (eigen - low), 0)) / eigen * np.sin(theta)
    cumulative = np.cumsum(weight)
    quantiles = (np.arange(small, 0, -1) - 0.5) / small
    values = np.sqrt(np.interp(quantiles, cumulative / cumulative[-1], eigen))
    return values / np.linalg.norm(values)


_LEGEND_ABOVE = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "left", "x": 0}


def _thin(length: int) -> np.ndarray:
    """At most `CURVE_POINTS` indices below `length`, the first and the last among them."""
    if length <= CURVE_POINTS:
        return np.arange(length)
    return np.unique(np.round(np.geomspace(1, length, CURVE_POINTS)).astype(int) - 1)


def _positive(series: list[float] | None, index: np.ndarray) -> list[float | None] | None:
    """The kept values; None where a logarithm shows nothing: zeros, and what is zero but for rounding."""
    if not series:
        return None
    floor = 1e-12 * max((value for value in series if value is not None and math.isfinite(value)), default=0.0)
    kept = [series[at] if at < len(series) else None for at in index]
    return [_short(value) if value is not None and value > floor else None for value in kept]


def _matrix_shape(shape: str | None, rank: int) -> tuple[int, int] | None:
    """The matrix behind a shape column: (out, rest) for more than two axes, None where it does not fit the rank."""
    try:
        sizes = [int(part) for part in str(shape).split("x")]
    except ValueError:
        return None
    if len(sizes) < 2:
        return None
    for rows, columns in ((sizes[0], math.prod(sizes[1:])), (sizes[-2], sizes[-1])):
        if min(rows, columns) == rank:
            return rows, columns
    return None


def _mean_of(rows: Any, column: str) -> float | None:
    values = [value for row in rows if (value := _finite(row.get(column))) is not None]
    return sum(values) / len(values) if values else None


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _short(value: float | None) -> float | None:
    """Five significant digits: what a screen shows, at a third of the bytes."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
