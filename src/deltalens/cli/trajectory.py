"""The command that looks along a run: trajectory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deltalens.cli.common import (
    AsJson,
    Exclude,
    Include,
    Jobs,
    Quiet,
    Ratios,
    Source,
    Spectrum,
    Threshold,
    app,
    bar,
    numbers,
)

__all__ = ["trajectory"]


@app.command()
def trajectory(
    source: Source,
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT CKPT...",
            help="Two or more of one run, ordered by their step: trainer_state.json, else a number in the name.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Write table, summary and report.html there.")
    ] = None,
    threshold: Threshold = 1e-5,
    compare_dtype: Annotated[
        str | None,
        typer.Option(help="bf16 (default) casts all sides first; stored (default if all are LoRA) as saved; fp32."),
    ] = None,
    spectrum: Spectrum = "exact",
    ratios: Ratios = "0.01,0.05,0.1,0.2",
    null_draws: Annotated[
        int, typer.Option(min=0, metavar="K", help="Simulated rounding-null draws a checkpoint and matrix.")
    ] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws and the bootstrap.")] = 0,
    include: Include = None,
    exclude: Exclude = None,
    jobs: Jobs = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Take up an unfinished trajectory in DIR, or start again.")
    ] = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure the checkpoints of one run: every metric at each, mask growth, and when its subspaces lock.

    Examples:

      deltalens trajectory base/ run/checkpoint-* -o out/

      deltalens trajectory base/ run/checkpoint-* --spectrum fast --null-draws 0

      deltalens trajectory base/ run/checkpoint-* --json | jq '{locked_at, locked_at_by_role}'
    """
    if len(checkpoints) < 2:
        raise typer.BadParameter("give two checkpoints or more; for one use analyze", param_hint="CKPT")
    from deltalens.analysis import Settings
    from deltalens.analysis.trajectory import trajectory as run
    from deltalens.errors import DeltalensError

    try:
        settings = Settings(
            threshold=threshold,
            compare_dtype=compare_dtype,  # type: ignore[arg-type]  # checked by Settings
            spectrum=spectrum,  # type: ignore[arg-type]
            ratios=numbers(ratios),
            null_draws=null_draws,
            seed=seed,
        )
    except DeltalensError:
        raise
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with bar("along the run", quiet or as_json) as progress:
        result = run(
            source,
            checkpoints,
            output=output,
            settings=settings,
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

        from deltalens.report.trajectory import print_trajectory

        console = Console(stderr=True)
        print_trajectory(result.summary, console)
        if output is not None:
            console.print(f"report: {output / 'report.html'}", highlight=False, soft_wrap=True)
