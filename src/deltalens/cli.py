"""The command line: parses, calls, prints; no logic.

Exit codes: 0 done, 1 it cannot be done (one line on stderr says why and what to do), 2 bad usage, 130 interrupted.
Everything but `--json` goes to stderr. Heavy rooms are imported inside the commands, so that `--help` is instant.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from deltalens._version import __version__
from deltalens.errors import DeltalensError

if TYPE_CHECKING:
    from deltalens.analysis.engine import Progress

__all__ = ["app", "main"]

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
def _bar(label: str, quiet: bool) -> Iterator[Progress]:
    """A progress bar on stderr with the time left, as a callback (done, total, name)."""
    if quiet:
        yield lambda done, total, name: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
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
        DownloadColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[name]}"),
    )
    with ProgressBar(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None, name="")
        yield lambda done, total, name: progress.update(task, completed=done, total=total, name=name[-48:])


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 0.05,0.2") from None


@app.command()
def analyze(
    source: Source,
    trained: Trained,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Write tables, summary and report.html there.")
    ] = None,
    threshold: Annotated[float, typer.Option(help="τ: an update is visible where |Δ| > τ.")] = 1e-5,
    compare_dtype: Annotated[
        str | None,
        typer.Option(
            help="bf16 (default) casts both sides first; stored (default for LoRA) as saved; fp32 in float32."
        ),
    ] = None,
    spectrum: Annotated[str, typer.Option(help="exact (float64), fast (randomised), none.")] = "exact",
    ratios: Annotated[
        str, typer.Option(help="Ratios of subspaces and masks; 10 % is always among them.")
    ] = "0.01,0.05,0.1,0.2",
    mask_rank: Annotated[
        int | None, typer.Option(help="One more pair of masks of this rank; 64 with --mask-share 0.5 is [G]'s.")
    ] = None,
    mask_share: Annotated[float, typer.Option(help="Share of the entries that the masks of --mask-rank hold.")] = 0.5,
    master: Annotated[
        str | None, typer.Option(metavar="DIR", help="float32 weights of TRAINED before they were rounded.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the source's factorisations there for the next run.")
    ] = None,
    null_draws: Annotated[
        int,
        typer.Option(min=0, metavar="K", help="Simulated rounding-null draws a matrix (stable rank, projections)."),
    ] = 0,
    include: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Only tensors that match.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Leave out tensors that match.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads; one a processor by default.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Take up an unfinished analysis in DIR, or start again.")
    ] = True,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json on stdout, and nothing else.")] = False,
) -> None:
    """Measure what training did to a model's weights, and print it beside the paper's published runs.

    Examples:

      deltalens analyze base/ trained/ -o out/

      deltalens analyze Qwen/Qwen3-1.7B-Base ./my-opd-run -o out/ --null-draws 3

      deltalens analyze base/ trained/ --spectrum none --json | jq .global.sparsity
    """
    from deltalens.analysis import Settings
    from deltalens.analysis import analyze as run

    try:
        settings = Settings(
            threshold=threshold,
            compare_dtype=compare_dtype,  # type: ignore[arg-type]  # checked by Settings
            spectrum=spectrum,  # type: ignore[arg-type]
            ratios=_numbers(ratios),
            mask_rank=mask_rank,
            mask_share=mask_share,
            null_draws=null_draws,
        )
    except DeltalensError:
        raise
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with _bar("analyzing", quiet or as_json) as progress:
        result = run(
            source,
            trained,
            output=output,
            settings=settings,
            include=include or (),
            exclude=exclude or (),
            master=master,
            cache=cache,
            jobs=jobs,
            resume=resume,
            progress=progress,
        )
    if as_json:
        print(json.dumps(result.summary, allow_nan=False))
    elif not quiet:
        _print_analysis(result, output)


def _print_analysis(result: Any, output: Path | None) -> None:
    from rich.console import Console

    from deltalens.report import print_report

    console = Console(stderr=True)
    print_report(result.tensors, result.summary, console)
    if output is not None:
        console.print(f"report: {output / 'report.html'}", highlight=False, soft_wrap=True)


def _fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


def main() -> None:
    """Run the command line; a user's mistake is one line, never a traceback."""
    try:
        app()
    except DeltalensError as error:
        _fail(f"deltalens: {error}", 1)
    except KeyboardInterrupt:
        _fail("deltalens: interrupted; the same command goes on where it stopped", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
