"""Showing a trajectory: the terminal's table, the page with its lines, the repr. Reads tables, knows no checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import polars as pl
from rich.console import Console
from rich.text import Text

from deltalens.report.html import page_assets, script_json, template_environment
from deltalens.report.plots import label
from deltalens.report.tables import DASH, Table, count, number, percent, printable
from deltalens.report.terminal import print_list, print_table

__all__ = ["print_trajectory", "render_trajectory_html", "trajectory_repr", "trajectory_table", "verdict"]

COLOURS = ("#3b7dd8", "#e08a1e", "#2a9d6f", "#9a6fd0", "#d1495b", "#8a8f98", "#5b7c99", "#b0803a")
GREY = "#8a8f98"
NARROW = 150  # columns of a terminal below which the table leaves its less needed columns out
_NEEDED_LESS = ("hill", "rel. norm", "rank null", "Jacc. null", "new", "gone", "FFN share", "attn. share")
_LEGEND = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "left", "x": 0}

Entry = Mapping[str, Any]


def _value(entry: Entry, name: str, inner: str = "median") -> float | None:
    """A number of one checkpoint's `global` or of a role; of an aggregate its median."""
    value = entry.get(name)
    return value.get(inner) if isinstance(value, Mapping) else value


def trajectory_table(summary: Entry) -> Table:
    """A line a checkpoint."""
    columns: tuple[tuple[str, Callable[[Entry], str]], ...] = (
        ("rel. norm", lambda g: percent(_value(g, "relative_norm"))),
        ("sparsity", lambda g: percent(_value(g, "sparsity"))),
        ("st. rank", lambda g: number(_value(g, "stable_rank"))),
        ("rank null", lambda g: number(_value(g, "stable_rank_null"))),
        ("hill", lambda g: number(_value(g, "hill"))),
        ("Sim₁₆ end", lambda g: number(_value(g, "sim16_right_end"))),
        ("Sim null", lambda g: number(_value(g, "sim16_right_end_null"))),
        ("to start", lambda g: number(_value(g, "sim16_right_start"))),
        ("Jaccard", lambda g: percent(_value(g, "jaccard_end"))),
        ("Jacc. null", lambda g: percent(_value(g, "jaccard_end_null"))),
        ("new", lambda g: percent(_value(g, "appeared"))),
        ("gone", lambda g: percent(_value(g, "vanished"))),
        ("FFN share", lambda g: percent(_value(g, "energy_share", "ffn"))),
        ("attn. share", lambda g: percent(_value(g, "energy_share", "attention"))),
    )
    entries = summary["checkpoints"]
    shown = [(name, cell) for name, cell in columns if any(cell(one["global"]) != DASH for one in entries)]
    rows = tuple((str(one["step"]), *(cell(one["global"]) for _, cell in shown)) for one in entries)
    locked = [at for at, one in enumerate(entries) if one["name"] == summary.get("locked_checkpoint")]
    note = (
        "St. rank (stable rank), hill and Sim₁₆ (right subspaces, with those of the end and the start): medians over "
        "matrices. Jaccard: with the final mask. Nulls: what rounding to bf16 makes of updates without any preference, "
        "of the same densities and independent of each other. new, gone: coordinates that turned visible, or invisible "
        "again, since the checkpoint before, of all."
    )
    return Table("Along the run", ("step", *(name for name, _ in shown)), rows, note, frozenset(locked))


def verdict(summary: Entry) -> str:
    """`locked_at` in a sentence, or why there is none."""
    entries = summary["checkpoints"]
    if not any(_value(one["global"], "sim16_right_end") is not None for one in entries):
        return "Sim₁₆ was not measured (--spectrum none, or no matrix): when the subspaces lock cannot be said."
    above = summary["locked_above"]
    if summary["locked_at"] is None:
        return f"Not locked before the last checkpoint: Sim₁₆ to the end stays above {above:g} from no earlier one."
    last = entries[-1]["step"]
    where = f" ({summary['locked_at'] / last:.0%} of the last)" if last else ""
    return f"Locked at step {summary['locked_at']}{where}: Sim₁₆ to the end stays above {above:g} from there."


def _by_role(summary: Entry) -> str:
    roles = summary.get("locked_at_by_role") or {}
    if not roles:
        return ""
    said = (f"{printable(role)} {'not before the end' if step is None else step}" for role, step in roles.items())
    return "Locked at, by role: " + ", ".join(said) + "."


def print_trajectory(summary: Entry, console: Console) -> None:
    """Print the run's table, when its subspaces lock, and the warnings."""
    entries = summary["checkpoints"]
    console.print(Text(_title(summary), style="bold"))
    console.print(
        Text(
            f"{count(summary['tensors'])} tensors, {count(summary['parameters'])} parameters, compared in "
            f"{summary['settings'].get('compare_dtype', 'bf16')}; steps {entries[0]['step']} to {entries[-1]['step']}, "
            f"from {summary['steps_from']}"
        )
    )
    narrow = _NEEDED_LESS if console.width < NARROW else ()
    print_table(trajectory_table(summary), console, drop=narrow)
    console.print(Text(verdict(summary), style="bold"))
    if roles := _by_role(summary):
        console.print(Text(roles, style="dim"))
    print_list("Warnings", [printable(warning) for warning in summary.get("warnings") or ()], console, "yellow")
    skipped = [printable(f"{one['tensor']}: {one['reason']}") for one in summary.get("skipped") or ()]
    print_list("Skipped", skipped, console, "")


def _title(summary: Entry) -> str:
    return f"{printable(summary['source']['path'])} → {len(summary['checkpoints'])} checkpoints"


def trajectory_repr(summary: Entry) -> str:
    """A trajectory in a few lines, for a notebook or a prompt."""
    table = trajectory_table(summary)
    lines = [f"deltalens trajectory: {_title(summary)}", "  " + "  ".join(name.strip() for name in table.columns)]
    lines += ["  " + "  ".join(row) for row in table.rows]
    lines.append(f"  {verdict(summary)}")
    lines += [f"  {key}: {len(summary[key])}" for key in ("skipped", "warnings") if summary.get(key)]
    return "\n".join(lines)


def render_trajectory_html(table: pl.DataFrame, summary: Entry) -> str:
    """The whole page as text; everything that comes from the checkpoints is escaped.

    `table` has the rows of trajectory.parquet, `summary` is schema 1; what is null or absent is left out.
    """
    whole = table.filter(pl.col("scope") == "global").sort("step")
    roles = table.filter(pl.col("scope") == "role").sort("step")
    made = {
        "similarity": _similarity(whole, summary),
        "similarity-roles": _role_lines(roles, "sim16_right_end", "Sim₁₆ to the end, median over matrices", [0, 1]),
        "rank": _stable_rank(whole),
        "masks": _masks(whole),
        "churn": _churn(whole),
        "energy": _role_lines(roles, "energy_share", "share of ‖Δ‖²", [0, None]),
    }
    figures = {key: figure for key, figure in made.items() if figure is not None}
    return (
        template_environment()
        .get_template("trajectory.html.j2")
        .render(
            **page_assets(),
            data=script_json({"figures": figures, "heatmap": None, "spectra": None}),
            figures=set(figures),
            title=_title(summary),
            version=printable(summary.get("deltalens", "")),
            tensors=count(summary.get("tensors")),
            parameters=count(summary.get("parameters")),
            verdict=verdict(summary),
            by_role=_by_role(summary),
            run=trajectory_table(summary),
            checkpoints=[
                (printable(one["name"]), one["step"], printable(one["path"])) for one in summary["checkpoints"]
            ],
            settings={printable(k): printable(str(v)) for k, v in (summary.get("settings") or {}).items()},
            warnings=[printable(warning) for warning in summary.get("warnings") or ()],
            skipped=[(printable(e["tensor"]), printable(e["reason"])) for e in summary.get("skipped") or ()],
        )
    )


def _line(table: pl.DataFrame, column: str, name: str, colour: str, dash: str = "solid") -> dict[str, Any] | None:
    if column not in table.columns or table[column].null_count() == table.height:
        return None
    values = [None if value is None else float(f"{value:.5g}") for value in table[column].to_list()]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": label(name),
        "x": table["step"].to_list(),
        "y": values,
        "line": {"color": colour, "dash": dash, "width": 2},
        "marker": {"size": 5},
        "hovertemplate": "step %{x}: %{y:.3~g}<extra>" + label(name) + "</extra>",
    }


def _figure(
    traces: Iterable[dict[str, Any] | None], title: str, span: Sequence[float | None] | None = None
) -> dict[str, Any] | None:
    """A figure over steps; None without a line."""
    drawn = [trace for trace in traces if trace is not None]
    if not drawn:
        return None
    axis: dict[str, Any] = {"title": {"text": title}}
    if span is not None:
        axis |= {"range": list(span)} if None not in span else {"rangemode": "tozero"}
    layout = {
        "height": 400,
        "margin": {"l": 70, "r": 10, "t": 40, "b": 50},
        "yaxis": axis,
        "xaxis": {"title": {"text": "step"}},
        "legend": _LEGEND,
    }
    return {"data": drawn, "layout": layout}


def _similarity(whole: pl.DataFrame, summary: Entry) -> dict[str, Any] | None:
    figure = _figure(
        (
            _line(whole, "sim16_right_end", "right, to the end", COLOURS[0]),
            _line(whole, "sim16_left_end", "left, to the end", COLOURS[2]),
            _line(whole, "sim16_right_start", "right, to the start", COLOURS[1], "dash"),
            _line(whole, "sim16_left_start", "left, to the start", COLOURS[3], "dash"),
            _line(whole, "sim16_right_end_null", "rounding null, to the end", COLOURS[4], "dot"),
            _line(whole, "sim16_right_end_random", "random", GREY, "dot"),
        ),
        "Sim₁₆, median over matrices",
        [0, 1.02],
    )
    if figure is None:
        return None
    above = summary["locked_above"]
    line = {"color": GREY, "width": 1, "dash": "dash"}
    shapes = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": above, "y1": above, "line": line}]
    if summary.get("locked_at") is not None:
        at = summary["locked_at"]
        shapes.append({"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": at, "x1": at, "line": line})
    figure["layout"]["shapes"] = shapes
    return figure


def _stable_rank(whole: pl.DataFrame) -> dict[str, Any] | None:
    return _figure(
        (
            _line(whole, "stable_rank", "stable rank", COLOURS[0]),
            _line(whole, "stable_rank_null", "rounding null", COLOURS[4], "dot"),
            _line(whole, "stable_rank_random", "random", GREY, "dot"),
        ),
        "stable rank, median over matrices",
        [0, None],
    )


def _masks(whole: pl.DataFrame) -> dict[str, Any] | None:
    return _figure(
        (
            _line(whole, "sparsity", "sparsity", COLOURS[1]),
            _line(whole, "jaccard_end", "Jaccard with the final mask", COLOURS[0]),
            _line(whole, "jaccard_end_null", "Jaccard under the rounding null", COLOURS[4], "dot"),
            _line(whole, "jaccard_end_random", "Jaccard of random masks", GREY, "dot"),
        ),
        "share",
        [0, 1.02],
    )


def _churn(whole: pl.DataFrame) -> dict[str, Any] | None:
    return _figure(
        (
            _line(whole, "appeared_per_step", "turned visible, a step", COLOURS[0]),
            _line(whole, "vanished_per_step", "turned invisible again, a step", COLOURS[4]),
        ),
        "share of all coordinates",
        [0, None],
    )


def _role_lines(roles: pl.DataFrame, column: str, title: str, span: Sequence[float | None]) -> dict[str, Any] | None:
    names = list(dict.fromkeys(roles["key"].to_list()))
    return _figure(
        (
            _line(roles.filter(pl.col("key") == name), column, name, COLOURS[i % len(COLOURS)])
            for i, name in enumerate(names)
        ),
        title,
        span,
    )
