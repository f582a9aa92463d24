"""The tables of a report as text cells, one source for the terminal and the page, and the summary's repr."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from deltalens.report.published import PUBLISHED, SOURCE_NOTE
from deltalens.report.regime import Placement, place, run_figures

__all__ = [
    "NULL_NOTE",
    "Coverage",
    "Table",
    "count",
    "coverage_table",
    "coverages",
    "energy_by",
    "group_table",
    "headline",
    "largest_table",
    "number",
    "percent",
    "printable",
    "published_table",
    "summary_repr",
]

DASH = "–"

NULL_NOTE = (
    "Rounding null: what an update without any preference (Gaussian, one scale a tensor, rounded once at the end) "
    "would show at the same density. It misfits embeddings, whose rows of unseen tokens do not move, hence core "
    "(without embedding and LM head) first; it does not fit weights trained in bf16 step by step. An excess of 1: "
    "rounding explains the coverage; read it with its interval (95 %, bootstrap over matrices)."
)


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are finished text; the first column is a label, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Coverage:
    """One coverage of the summary: the share of visible updates inside a mask, beside chance and rounding."""

    label: str
    core: bool
    nonzero: bool
    ratio: str
    seen: float | None
    median: float | None
    random: float | None
    null: float | None
    excess: float | None
    low: float | None
    high: float | None


def percent(value: float | None) -> str:
    """A fraction as a percentage with three significant digits; never 100 % or 0 % for what is not."""
    if value is None or not math.isfinite(value):
        return DASH
    scaled = 100 * value
    if 99.95 <= scaled < 100:
        return f"{scaled:.6f}".rstrip("0") + " %" if scaled < 99.999999 else "> 99.999999 %"
    return f"{scaled:.1f} %" if scaled >= 100 else f"{_three(scaled)} %"


def number(value: float | None) -> str:
    """Three significant digits, whole numbers from 100 on."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:,.0f}" if abs(value) >= 100 else _three(value)


def count(value: int | None) -> str:
    """A count with a separator for thousands."""
    return DASH if value is None else f"{value:,}"


def printable(text: str) -> str:
    """The text with control characters spelled out, so that a tensor's name cannot drive a terminal."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in str(text))


def coverages(values: Mapping[str, Any]) -> list[Coverage]:
    """Every coverage in a summary's `global` (or a role's or layer's values): core first, then 10 %, low magnitude
    before principal, visible before non-zero."""
    found = []
    for key, entry in values.items():
        match = re.fullmatch(r"(principal|low_magnitude)_coverage_(.+)pct((?:_nonzero|_core)*)", key)
        if match is None or not isinstance(entry, Mapping):
            continue
        mask, ratio, suffix = match.groups()
        core, nonzero = "_core" in suffix, "_nonzero" in suffix
        size = re.sub(r"^rank(\d+)_", r"rank \1, ", ratio)
        label = f"{'low-magnitude' if mask == 'low_magnitude' else 'principal'} {size} %"
        label += ", core" if core else ", all"
        label += ", |Δ| > 0" if nonzero else ""
        names = ("pooled", "median", "random", "null", "excess", "excess_low", "excess_high")
        cells = [_finite(entry.get(name)) for name in names]
        order = (not core, ratio != "10", _ratio(ratio), nonzero, mask)
        found.append((order, Coverage(label, core, nonzero, ratio, *cells)))
    return [coverage for _, coverage in sorted(found, key=lambda pair: pair[0])]


def coverage_table(values: Mapping[str, Any], *, ratios: Iterable[str] | None = None) -> Table:
    """Every coverage, or those of `ratios` (in percent, as text), with seen / random / rounding null / excess."""
    wanted = [one for one in coverages(values) if ratios is None or one.ratio in set(ratios)]
    rows = tuple(
        (one.label, percent(one.seen), percent(one.random), percent(one.null), excess(one), percent(one.median))
        for one in wanted
    )
    columns = ("share of updates in mask", "seen", "random", "rounding null", "excess", "median")
    return Table("Coverage of the masks", columns, rows, NULL_NOTE if rows else "")


def excess(one: Coverage) -> str:
    """Seen over null, with its interval where there is one."""
    if one.excess is None:
        return DASH
    interval = "" if one.low is None or one.high is None else f" [{one.low:.3f}, {one.high:.3f}]"
    return f"{one.excess:.3f}{interval}"


def energy_by(tensors: pl.DataFrame, column: str) -> dict[str, float]:
    """Share of Σ‖Δ‖² by the values of `column`; empty where there is no energy."""
    if "delta_energy" not in tensors.columns or column not in tensors.columns:
        return {}
    usable = tensors.filter(pl.col("delta_energy").is_finite() & pl.col(column).is_not_null())
    total = usable["delta_energy"].sum()
    if not total:
        return {}
    sums = usable.group_by(column, maintain_order=True).agg(pl.col("delta_energy").sum())
    return {str(key): energy / total for key, energy in sums.iter_rows()}


def group_table(tensors: pl.DataFrame, summary: Mapping[str, Any], column: str) -> Table:
    """One line a role (`column="role"`) or layer, from the summary's own reductions."""
    groups: Mapping[str, Any] = summary.get(f"by_{column}") or {}
    shares = energy_by(tensors, column)
    keys = list(groups)
    if column == "layer":
        keys.sort(key=lambda key: (0, int(key), "") if str(key).isdigit() else (1, 0, str(key)))
    else:
        keys.sort(key=lambda key: -shares.get(key, 0.0))
    rows = []
    for key in keys:
        values = groups[key]
        excesses = []
        for mask in ("low_magnitude", "principal"):
            entry = values.get(f"{mask}_coverage_10pct")
            excesses.append(number(_finite(entry.get("excess"))) if isinstance(entry, Mapping) else DASH)
        rows.append(
            (
                printable(key), count(values.get("tensors")), count(values.get("parameters")),
                percent(shares.get(key)),
                percent(values.get("relative_norm")), percent(values.get("sparsity")),
                percent(_inner(values.get("top16_energy"), "mean")), number(_inner(values.get("stable_rank"), "mean")),
                *excesses,
            )
        )  # fmt: skip
    columns = (
        column, "tensors", "parameters", "energy", "rel. norm", "sparsity", "top-16", "stable rank",
        "low ×", "princ. ×",
    )  # fmt: skip
    note = (
        "energy: share of the update's squared norm. top-16 and stable rank: means over matrices. ×: low-magnitude "
        "and principal coverage at 10 % over what rounding alone gives."
    )
    return Table(f"By {column}", columns, tuple(rows), note if rows else "")


def largest_table(tensors: pl.DataFrame, limit: int | None = 10) -> Table:
    """The tensors with the largest relative norm, undefined ones last."""
    columns = ("tensor", "shape", "rel. norm", "sparsity", "top-16", "stable rank", "Gaussian")
    if "relative_norm" not in tensors.columns:
        return Table("Tensors that moved most", columns, ())
    ordered = tensors.sort("relative_norm", descending=True, nulls_last=True)
    rows = []
    for row in (ordered if limit is None else ordered.head(limit)).iter_rows(named=True):
        rows.append(
            (
                printable(row["name"]), printable(row.get("shape") or DASH).replace("x", "×"),
                percent(row.get("relative_norm")), percent(row.get("sparsity")), percent(row.get("top16_energy")),
                number(row.get("stable_rank")), number(row.get("stable_rank_random")),
            )
        )  # fmt: skip
    note = "Gaussian: the stable rank of a Gaussian update of the same shape, before rounding."
    return Table("Tensors that moved most", columns, tuple(rows), note)


def published_table(summary: Mapping[str, Any], placement: Placement | None = None) -> Table:
    """This run first, then the published rows, nearest first, those that could not be compared last."""
    placement = placement or place(summary)
    run = run_figures(summary)
    distances = dict(placement.distances)
    fields = (
        "relative_norm",
        "sparsity",
        "top16_energy",
        "stable_rank",
        "low_magnitude_coverage",
        "principal_coverage",
    )
    cells = [number(run[name]) if name == "stable_rank" else percent(run[name]) for name in fields]
    rows = [("this run", DASH, *cells, DASH)]
    for row in sorted(PUBLISHED, key=lambda row: distances.get(row, math.inf)):
        values = [getattr(row, name) for name in fields]
        cells = [number(v) if n == "stable_rank" else percent(v) for n, v in zip(fields, values, strict=True)]
        distance = f"{distances[row]:.2f}" if row in distances else DASH
        rows.append((row.name, row.regime.split(" ")[0], *cells, distance))
    columns = (
        "pair", "regime", "rel. norm", "sparsity", "top-16", "stable rank", "low-mag. cov.", "princ. cov.", "distance",
    )  # fmt: skip
    return Table("Beside the published runs", columns, tuple(rows), SOURCE_NOTE, frozenset({0}))


def headline(summary: Mapping[str, Any], tensors: pl.DataFrame | None = None) -> list[tuple[str, str, str]]:
    """The figures to read first: (label, value, what chance or the null gives), those that are defined."""
    overall = summary.get("global") or {}
    settings = summary.get("settings") or {}
    threshold = settings.get("threshold", 1e-5)
    entries = [
        ("relative norm", percent(overall.get("relative_norm")), "‖Δ‖ / ‖W‖"),
        ("sparsity", percent(overall.get("sparsity")), f"|Δ| ≤ {threshold:g}"),
        ("unchanged", percent(overall.get("unchanged_fraction")), "Δ = 0"),
    ]
    for one in coverages(overall):
        if one.ratio == "10" and not one.nonzero:
            label = one.label.replace(" 10 %", " coverage")
            beside = f"rounding null {percent(one.null)}, random {percent(one.random)}, excess {excess(one)}"
            entries.append((label, percent(one.seen), beside))
    for key, label, text, middle in (
        ("stable_rank", "stable rank", number, "mean"),
        ("effective_rank", "effective rank", number, "mean"),
        ("top16_energy", "top-16 energy", percent, "mean"),
        ("principal_projection_10pct", "principal projection", percent, "median"),
    ):
        beside = f"{middle} over matrices"
        for suffix, name in (("random", "Gaussian"), ("null", "rounding null")):
            other = _beside(overall, tensors, key, suffix, middle)
            beside += f", {name} {text(other)}" if other is not None else ""
        entries.append((label, text(_inner(overall.get(key), middle)), beside))
    return [entry for entry in entries if entry[1] != DASH]


def summary_repr(summary: Mapping[str, Any]) -> str:
    """A summary in a few lines, for a notebook or a prompt."""
    overall = summary.get("global") or {}
    paths = [printable((summary.get(side) or {}).get("path", "?")) for side in ("source", "trained")]
    lines = [
        f"deltalens analysis: {paths[0]} → {paths[1]}",
        f"  {count(overall.get('tensors'))} tensors, {count(overall.get('parameters'))} parameters",
    ]
    figures = headline(summary)
    plain = [f"{label} {value}" for label, value, _ in figures if "coverage" not in label]
    lines += ["  " + ", ".join(plain[at : at + 4]) for at in range(0, len(plain), 4)]
    lines += [f"  {label}: {value} ({beside})" for label, value, beside in figures if ", core" in label]
    lines.append(f"  {place(summary).verdict}")
    for key in ("skipped", "warnings"):
        if summary.get(key):
            lines.append(f"  {key}: {len(summary[key])}")
    return "\n".join(lines)


def _three(value: float) -> str:
    """Three significant digits with their zeros, so that columns line up: 79.0, not 79."""
    return "0" if value == 0 else f"{value:#.3g}".rstrip(".")


def _inner(value: Any, key: str) -> float | None:
    return _finite(value.get(key) if isinstance(value, Mapping) else value)


def _beside(
    overall: Mapping[str, Any], tensors: pl.DataFrame | None, key: str, suffix: str, middle: str
) -> float | None:
    """What chance or rounding gives for a metric: from the summary, else over the tensors' column."""
    entry = overall.get(f"{key}_{suffix}")
    if entry is None and isinstance(overall.get(key), Mapping):
        entry = overall[key].get(suffix)
    value = _inner(entry, middle)
    column = f"{key}_{suffix}"
    if value is None and tensors is not None and column in tensors.columns:
        value = _finite(tensors[column].mean() if middle == "mean" else tensors[column].median())
    return value


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.inf
