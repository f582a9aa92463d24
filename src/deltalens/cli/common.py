"""What every command shares: the application, its common options, the progress bar, lines on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltalens._version import __version__

if TYPE_CHECKING:
    from deltalens.analysis.engine import Progress

__all__ = [
    "AsJson",
    "Exclude",
    "Include",
    "Jobs",
    "Quiet",
    "Ratios",
    "Source",
    "Spectrum",
    "Threshold",
    "Trained",
    "app",
    "bar",
    "note",
    "numbers",
    "print_analysis",
]

app = typer.Typer(
    help="Show, test and exploit what post-training does to a model's weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[str, typer.Argument(metavar="SOURCE", help="The checkpoint that training started from.")]
Trained = Annotated[str, typer.Argument(metavar="TRAINED", help="The checkpoint that training gave.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables.")]
Threshold = Annotated[float, typer.Option(help="τ: an update is visible where |Δ| > τ.")]
Spectrum = Annotated[str, typer.Option(help="exact (float64), fast (randomised), none.")]
Ratios = Annotated[str, typer.Option(help="Ratios of subspaces and masks; 10 % is always among them.")]
Include = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Only tensors that match.")]
Exclude = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Leave out tensors that match.")]
Jobs = Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads; one a processor by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print summary.json on stdout, and nothing else.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"deltalens {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """SOURCE and TRAINED are local directories or files, or Hub ids with an optional @revision."""


@contextmanager
def bar(label: str, quiet: bool, *, counts: str = "bytes") -> Iterator[Progress]:
    """A progress bar on stderr with the time left, as a callback (done, total, name); `counts` bytes or items."""
    if quiet:
        yield lambda done, total, name: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as ProgressBar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn() if counts == "bytes" else MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[name]}"),
    )
    with ProgressBar(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None, name="")
        yield lambda done, total, name: progress.update(task, completed=done, total=total, name=name[-48:])


def numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 0.05,0.2") from None


def note(text: str) -> None:
    print(text, file=sys.stderr)


def print_analysis(result: Any, output: Path | None) -> None:
    from rich.console import Console

    from deltalens.report import print_report

    console = Console(stderr=True)
    print_report(result.tensors, result.summary, console)
    if output is not None:
        console.print(f"report: {output / 'report.html'}", highlight=False, soft_wrap=True)
