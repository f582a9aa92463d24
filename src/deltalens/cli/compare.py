"""The command that looks at several runs of one source: compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deltalens.cli.common import AsJson, Exclude, Include, Jobs, Quiet, Source, Threshold, app, bar

__all__ = ["compare"]


@app.command()
def compare(
    source: Source,
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Two or more checkpoints trained from it.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Write tables, summary and report.html there.")
    ] = None,
    threshold: Threshold = 1e-5,
    compare_dtype: Annotated[
        str | None,
        typer.Option(help="bf16 (default) casts all sides first; stored (default if all are LoRA) as saved; fp32."),
    ] = None,
    null_draws: Annotated[
        int, typer.Option(min=0, metavar="K", help="Simulated draws a run and matrix for Sim_16's rounding null.")
    ] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws and the bootstrap.")] = 0,
    include: Include = None,
    exclude: Exclude = None,
    jobs: Jobs = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Take up an unfinished comparison in DIR, or start again.")
    ] = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure what the updates of several runs of one source share, beside what chance and rounding give.

    Examples:

      deltalens compare base/ seed-1/ seed-2/ -o out/

      deltalens compare Qwen/Qwen3-1.7B-Base ./opd ./sft ./grpo --null-draws 5 -o out/

      deltalens compare base/ opd/ sft/ --null-draws 0 --json | jq '.pairs[] | {a, b, a_in_b, a_in_b_null}'
    """
    if len(runs) < 2:
        raise typer.BadParameter("give two runs or more; for one run use analyze", param_hint="RUN")
    from deltalens.analysis import Settings
    from deltalens.analysis.compare import compare as run

    try:
        Settings(threshold=threshold, compare_dtype=compare_dtype)  # type: ignore[arg-type]  # checks both
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with bar("comparing", quiet or as_json) as progress:
        result = run(
            source,
            runs,
            output=output,
            threshold=threshold,
            compare_dtype=compare_dtype,  # type: ignore[arg-type]  # checked above
            null_draws=null_draws,
            seed=seed,
            include=include or (),
            exclude=exclude or (),
            jobs=jobs,
            resume=resume,
            progress=progress,
        )
    if as_json:
        print(json.dumps(result.summary, allow_nan=False))
    elif not quiet:
        from rich.console import Console

        from deltalens.report.compare import print_compare

        console = Console(stderr=True)
        print_compare(result.pairs, result.summary, console)
        if output is not None:
            console.print(f"report: {output / 'report.html'}", highlight=False, soft_wrap=True)
