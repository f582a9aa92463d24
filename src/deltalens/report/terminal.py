"""The report a person reads in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from deltalens.report.regime import place
from deltalens.report.tables import (
    Table,
    count,
    coverage_table,
    group_table,
    headline,
    largest_table,
    printable,
    published_table,
)

__all__ = ["print_list", "print_report", "print_table"]

_SHOWN = 5  # warnings and skipped tensors listed; the rest is counted
_NARROW = 110  # columns of a terminal below which a table leaves its less needed columns out


def print_report(tensors: pl.DataFrame, summary: Mapping[str, Any], console: Console) -> None:
    """Print the global figures, the coverages, the roles, the ten tensors that moved most and the run's place
    among the published ones. Columns of `tensors` and keys of `summary` may be absent or null."""
    overall = summary.get("global") or {}
    settings = summary.get("settings") or {}
    sides = [printable((summary.get(side) or {}).get("path", "?")) for side in ("source", "trained")]
    console.print(Text(f"{sides[0]} → {sides[1]}", style="bold"))
    console.print(
        Text(
            f"{count(overall.get('tensors'))} tensors, {count(overall.get('parameters'))} parameters, compared in "
            f"{settings.get('compare_dtype', 'bf16')}"
        )
    )
    console.print()
    figures = RichTable(box=None, show_header=False, padding=(0, 2, 0, 0))
    for label, value, beside in headline(summary, tensors):
        if "coverage" in label:
            continue  # the table below has them all
        figures.add_row(Text(label), Text(value, style="bold"), Text(beside, style="dim"))
    console.print(figures)

    narrow = console.width < _NARROW
    print_table(coverage_table(overall, ratios=("10",)), console, drop=("median",) if narrow else ())
    print_table(
        group_table(tensors, summary, "role"),
        console,
        drop=("tensors", "parameters", "top-16") if narrow else ("tensors",),
    )
    print_table(largest_table(tensors), console, drop=("Gaussian", "top-16") if narrow else ())

    placement = place(summary)
    table = published_table(summary, placement)
    print_table(table, console, drop=("low-mag. cov.", "princ. cov.") if narrow else ())
    console.print(Text(placement.verdict, style="bold"))
    for line in (placement.why, *placement.caveats):
        if line:
            console.print(Text(line, style="dim"))

    warnings = [printable(warning) for warning in summary.get("warnings") or ()]
    print_list("Warnings", warnings, console, "yellow")
    skipped = [printable(f"{entry['tensor']}: {entry['reason']}") for entry in summary.get("skipped") or ()]
    print_list("Skipped", skipped, console, "")


def print_table(table: Table, console: Console, *, drop: Sequence[str] = ()) -> None:
    """Print a table without the columns in `drop`; nothing where it has no rows."""
    if not table.rows:
        return
    kept = [at for at, column in enumerate(table.columns) if column not in drop]
    shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False)
    for at in kept:
        first = at == 0
        shown.add_column(
            table.columns[at],
            justify="left" if first else "right",
            overflow="fold",
            no_wrap=not first,
            min_width=10 if first else None,
        )
    for index, row in enumerate(table.rows):
        style = "bold" if index in table.marked else ""
        shown.add_row(*(Text(row[at], style=style) for at in kept))
    console.print()
    console.print(shown)
    if table.note and not any(table.note.startswith(f"{column}:") for column in drop):
        console.print(Text(table.note, style="dim"))


def print_list(title: str, lines: Sequence[str], console: Console, style: str) -> None:
    """Print a count and the first lines."""
    if not lines:
        return
    console.print()
    console.print(Text(f"{title}: {len(lines)}", style=f"bold {style}".strip()))
    for line in lines[:_SHOWN]:
        console.print(Text(f"  {line}", style=style))
    if len(lines) > _SHOWN:
        console.print(Text(f"  and {len(lines) - _SHOWN} more, in summary.json", style="dim"))
