"""What `compare` found, for the terminal and as one self-contained page. Reads tables, knows no checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from deltalens.report import plots
from deltalens.report.tables import DASH, Table, count, number, percent, printable

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["compare_repr", "matrix", "matrix_tables", "print_compare", "render_compare_html"]

NOTE = (
    "Random: Σ p_A·p_B over tensors. Rounding null: what two updates without any preference would share, each Gaussian "
    "with its own scale a tensor and rounded once at the end; both find small weights easier to move, so they overlap "
    "more than p_A·p_B. An excess of 1: rounding explains the overlap (interval: 95 %, bootstrap over tensors). One "
    "scale a tensor misfits embeddings, hence core (without embedding and LM head); the null does not fit weights "
    "trained in bf16 step by step. |Δ| corr.: of the magnitudes "
    "where both changed. Sign agreement is 0.5 where nothing but the spacing is shared."
)
SIM_NOTE = (
    "Sim_16: mean over matrices of ‖AᵀB‖²/16 for the leading singular vectors of both updates. Rounding alone lifts it "
    "above K/n: compare with the simulated null, not with chance."
)
# (key, title, as a percentage, centre of a diverging scale)
MATRICES: tuple[tuple[str, str, bool, float | None], ...] = (
    ("a_in_b", "share of the row's updates that the column shares", True, None),
    ("a_in_b_null", "the same under the rounding null", True, None),
    ("a_in_b_random", "the same by chance", True, None),
    ("a_in_b_excess", "overlap over the rounding null", False, 1.0),
    ("sign_agreement", "sign agreement on the intersection", False, 0.5),
    ("cosine", "cosine of the updates", False, 0.0),
    ("sim16_right", "Sim_16 of the right subspaces", False, None),
    ("sim16_right_null", "Sim_16 of the right subspaces under the rounding null", False, None),
)
_SHOWN_MATRICES = ("a_in_b", "a_in_b_excess", "sign_agreement", "sim16_right")
# Of one tensor (or the mean over those that share a cell): layer × module.
_CELLS: tuple[tuple[str, str, bool, float | None], ...] = (
    ("a_in_b_excess", "overlap over the rounding null", False, 1.0),
    ("a_in_b", "share of A's updates in B", True, None),
    ("b_in_a", "share of B's updates in A", True, None),
    ("jaccard", "Jaccard", False, None),
    ("sign_agreement", "sign agreement on the intersection", False, 0.5),
    ("magnitude_correlation", "correlation of |Δ| on the intersection", False, 0.0),
    ("cosine", "cosine", False, 0.0),
    ("sim16_right", "Sim_16, right", False, None),
    ("sim16_left", "Sim_16, left", False, None),
)
_NARROW = 110
_Line = tuple[str, Mapping[str, Any], str]  # label, values, `a_in_b` or `b_in_a`


def matrix(summary: Mapping[str, Any], key: str, *, core: bool = False) -> list[list[float | None]]:
    """A number of every ordered pair of runs: [i][j] of `a_in_b…` is about the share of run i's updates in run j.

    The diagonal is None: a run compared with itself says nothing.
    """
    place = {run["name"]: i for i, run in enumerate(summary["runs"])}
    out: list[list[float | None]] = [[None] * len(place) for _ in place]
    for pair in summary["pairs"]:
        values = (pair.get("core") or {}) if core else pair
        i, j = place[pair["a"]], place[pair["b"]]
        out[i][j], out[j][i] = values.get(key), values.get(key.replace("a_in_b", "b_in_a"))
    return out


def matrix_tables(summary: Mapping[str, Any], keys: Sequence[str] = _SHOWN_MATRICES) -> list[Table]:
    """The chosen matrices over runs as text, those that have any number."""
    names = [printable(run["name"]) for run in summary["runs"]]
    tables = []
    for key, title, as_percent, _ in MATRICES:
        values = matrix(summary, key)
        if key not in keys or all(value is None for line in values for value in line):
            continue
        text = percent if as_percent else number
        rows = tuple((name, *(text(value) for value in line)) for name, line in zip(names, values, strict=True))
        tables.append(Table(title[0].upper() + title[1:], ("", *names), rows))
    return tables


def _runs_table(summary: Mapping[str, Any]) -> Table:
    rows = tuple(
        (printable(run["name"]), percent(run.get("density")), percent(run.get("density_nonzero")))
        for run in summary["runs"]
    )
    return Table("Runs", ("run", "visible", "|Δ| > 0"), rows)


def _overlap_table(rows: Sequence[_Line], title: str, first: str, note: str = "") -> Table:
    """One line a label: the share of one run's updates that the other has too, beside chance and rounding."""
    cells = []
    for label, v, side in rows:
        cells.append(
            (
                label, percent(v.get(side)), percent(v.get(f"{side}_random")), percent(v.get(f"{side}_null")),
                with_interval(v, f"{side}_excess"), number(v.get("lift")), number(v.get("sign_agreement")),
                number(v.get("magnitude_correlation")), number(v.get("magnitude_correlation_null")),
                number(v.get("jaccard")), number(v.get("cosine")),
            )
        )  # fmt: skip
    columns = (
        first, "seen", "random", "null", "over null", "over random", "signs", "|Δ| corr.", "its null", "Jaccard",
        "cosine",
    )  # fmt: skip
    return Table(title, columns, tuple(cells), note)


def _subspace_table(rows: Sequence[tuple[str, Mapping[str, Any]]], title: str, first: str, note: str = "") -> Table:
    """Two lines a label: Sim_16 of the right and of the left subspaces."""
    cells = []
    for label, v in rows:
        for side in ("right", "left"):
            name = f"sim16_{side}"
            if v.get(name) is None:
                continue
            seen, null = with_interval(v, name), _with_deviation(v, f"{name}_null")
            cells.append(
                (f"{label}, {side}", seen, number(v.get(f"{name}_random")), null, number(v.get(f"{name}_excess")))
            )
    return Table(title, (first, "Sim_16", "random", "null", "over null"), tuple(cells), note)


def with_interval(values: Mapping[str, Any], key: str) -> str:
    """A number with its 95 % interval where there is one."""
    value, low, high = (values.get(key + end) for end in ("", "_low", "_high"))
    if value is None:
        return DASH
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _with_deviation(values: Mapping[str, Any], key: str) -> str:
    value, deviation = values.get(key), values.get(f"{key}_std")
    return number(value) if value is None or deviation is None else f"{number(value)} ± {deviation:.1g}"


def _label(pair: Mapping[str, Any], *, swapped: bool = False) -> str:
    a, b = printable(pair["a"]), printable(pair["b"])
    return f"{b} in {a}" if swapped else f"{a} in {b}"


def _pair_lines(summary: Mapping[str, Any]) -> list[_Line]:
    """Both directions of every pair, over all tensors and over the core."""
    lines: list[_Line] = []
    for pair in summary["pairs"]:
        for values, end in ((pair, ""), (pair.get("core"), ", core")):
            if values:
                lines.append((_label(pair) + end, values, "a_in_b"))
                lines.append((_label(pair, swapped=True) + end, values, "b_in_a"))
    return lines


def _direction_lines(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(f"{printable(pair['a'])}, {printable(pair['b'])}", pair) for pair in summary["pairs"]]


def _scope_lines(pairs: pl.DataFrame, a: str, b: str, scope: str) -> list[tuple[str, Mapping[str, Any]]]:
    chosen = pairs.filter((pl.col("a") == a) & (pl.col("b") == b) & (pl.col("scope") == scope))
    lines: list[tuple[str, Mapping[str, Any]]] = [(printable(row["key"]), row) for row in chosen.iter_rows(named=True)]
    if scope == "layer":
        lines.sort(key=lambda line: (not line[0].isdigit(), int(line[0]) if line[0].isdigit() else 0, line[0]))
    return lines


def print_compare(pairs: pl.DataFrame, summary: Mapping[str, Any], console: Console) -> None:
    """Print the densities, every pair beside chance and rounding, matrices over three runs or more, and the roles
    where there are two runs."""
    from rich.text import Text

    from deltalens.report.terminal import print_list, print_table

    source, settings = summary.get("source") or {}, summary.get("settings") or {}
    console.print(Text(f"{len(summary['runs'])} runs of {printable(source.get('path', '?'))}", style="bold"))
    console.print(
        Text(
            f"{count(summary.get('tensors'))} tensors, {count(summary.get('parameters'))} parameters, compared in "
            f"{settings.get('compare_dtype')}, visible: |Δ| > {settings.get('threshold', 1e-5):g}"
        )
    )
    drop = ("over random", "|Δ| corr.", "its null", "Jaccard", "cosine") if console.width < _NARROW else ()
    print_table(_runs_table(summary), console)
    print_table(_overlap_table(_pair_lines(summary), "What the updates share", "updates of", NOTE), console, drop=drop)
    print_table(_subspace_table(_direction_lines(summary), "Directions", "runs, side", SIM_NOTE), console)
    if len(summary["runs"]) > 2:
        for table in matrix_tables(summary):
            print_table(table, console)
    else:
        for pair in summary["pairs"]:
            roles = [(*line, "a_in_b") for line in _scope_lines(pairs, pair["a"], pair["b"], "role")]
            print_table(_overlap_table(roles, f"{_label(pair)}, by role", "role"), console, drop=drop)
    print_list("Warnings", [printable(warning) for warning in summary.get("warnings") or ()], console, "yellow")
    skipped = [printable(f"{entry['tensor']}: {entry['reason']}") for entry in summary.get("skipped") or ()]
    print_list("Skipped", skipped, console, "")


def compare_repr(summary: Mapping[str, Any]) -> str:
    """A summary in a few lines, for a notebook or a prompt."""
    lines = [
        f"deltalens comparison: {len(summary['runs'])} runs of {printable(summary['source']['path'])}, "
        f"{count(summary.get('tensors'))} tensors"
    ]
    for pair in summary["pairs"]:
        lines.append(
            f"  {_label(pair)}: {percent(pair['a_in_b'])} (random {percent(pair['a_in_b_random'])}, rounding null "
            f"{percent(pair['a_in_b_null'])}, excess {with_interval(pair, 'a_in_b_excess')}), signs "
            f"{number(pair['sign_agreement'])}, Sim_16 right {number(pair['sim16_right'])} (random "
            f"{number(pair['sim16_random'])}, null {number(pair['sim16_right_null'])})"
        )
    return "\n".join(lines)


def _matrix_figure(summary: Mapping[str, Any], key: str, as_percent: bool, centre: float | None) -> dict[str, Any]:
    """Run × run, the number written in each cell."""
    values, names = matrix(summary, key), [plots.label(run["name"]) for run in summary["runs"]]
    scale, text = (100.0, percent) if as_percent else (1.0, number)
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": names,
        "y": names,
        "z": [[None if value is None else scale * value for value in line] for line in values],
        "text": [["" if value is None else text(value) for value in line] for line in values],
        "texttemplate": "%{text}",
        "hovertemplate": "%{y}, %{x}: %{text}<extra></extra>",
        "hoverongaps": False,
        "colorscale": "Cividis",
        "xgap": 2,
        "ygap": 2,
    }
    if centre is not None:
        trace |= plots.diverging(values, centre)
    layout = {
        "height": 220 + 44 * len(names),
        "margin": {"l": 10, "r": 10, "t": 20, "b": 30},
        "xaxis": {"type": "category", "automargin": True, "showgrid": False},
        "yaxis": {"type": "category", "autorange": "reversed", "automargin": True, "showgrid": False},
    }
    return {"data": [trace], "layout": layout}


def render_compare_html(pairs: pl.DataFrame, tensors: pl.DataFrame, summary: Mapping[str, Any]) -> str:
    """The whole page as text: matrices over runs, layer × module heatmaps of each pair, tables.

    `pairs` and `tensors` are those of `CompareResult`. Everything from the checkpoints is escaped.
    """
    from deltalens.report.html import page_assets, script_json, template_environment

    figures, charts = {}, []
    for key, title, as_percent, centre in MATRICES:
        if any(value is not None for line in matrix(summary, key) for value in line):
            figures[key] = _matrix_figure(summary, key, as_percent, centre)
            charts.append((key, title))
    grid: dict[str, Any] | None = None
    choices: list[tuple[str, list[tuple[str, str]]]] = []
    for at, pair in enumerate(summary["pairs"]):
        one = plots.heatmap(tensors.filter((pl.col("a") == pair["a"]) & (pl.col("b") == pair["b"])), _CELLS)
        if one is None:
            continue
        named = {f"{at}:{key}": entry for key, entry in one["metrics"].items()}
        choices.append(
            (f"{printable(pair['a'])}, {printable(pair['b'])}", [(key, entry["title"]) for key, entry in named.items()])
        )
        grid = one | {"metrics": (grid["metrics"] if grid else {}) | named}
    scopes = []
    for pair in summary["pairs"]:
        tables = []
        for scope in ("role", "module", "layer"):
            chosen = _scope_lines(pairs, pair["a"], pair["b"], scope)
            for side in ("a_in_b", "b_in_a"):
                lines = [(*line, side) for line in chosen]
                title = f"{_label(pair, swapped=side == 'b_in_a')}, by {scope}"
                tables.append(_overlap_table(lines, title, scope))
            tables.append(_subspace_table(chosen, f"Directions by {scope}", scope))
        scopes.append((f"{printable(pair['a'])}, {printable(pair['b'])}", tables))
    return (
        template_environment()
        .get_template("compare.html.j2")
        .render(
            **page_assets(),
            data=script_json({"figures": figures, "heatmap": grid, "spectra": None}),
            source=printable((summary.get("source") or {}).get("path", "?")),
            version=printable(summary.get("deltalens", "")),
            tensors=count(summary.get("tensors")),
            parameters=count(summary.get("parameters")),
            settings={printable(key): printable(value) for key, value in (summary.get("settings") or {}).items()},
            runs=[(printable(run["name"]), printable(run["path"])) for run in summary["runs"]],
            densities=_runs_table(summary),
            overlap=_overlap_table(_pair_lines(summary), "What the updates share", "updates of", NOTE),
            directions=_subspace_table(_direction_lines(summary), "Directions", "runs, side", SIM_NOTE),
            charts=charts,
            choices=choices,
            dropped=grid["dropped"] if grid else 0,
            scopes=scopes,
            warnings=[printable(warning) for warning in summary.get("warnings") or ()],
            skipped=[(printable(e["tensor"]), printable(e["reason"])) for e in summary.get("skipped") or ()],
        )
    )
