"""`deltalens study`: a whole study from one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltalens.cli.common import Quiet, app, note

if TYPE_CHECKING:
    from deltalens.study import Runner

__all__ = ["study"]


@app.command()
def study(
    name: Annotated[str, typer.Argument(metavar="NAME|YAML", help="A study that comes with deltalens, or a file.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="By default study-NAME; small ends in -small.")
    ] = None,
    scale: Annotated[str, typer.Option(help="full, or another that the file names (small, seeds).")] = "full",
    only: Annotated[
        str | None, typer.Option(metavar="RUN|GROUP", help="One run, comparison or group, and what it rests on.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every config and list the steps; make none.")
    ] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Write the pages from what is there.")] = False,
    results: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write each group's small tables and the pages there too, to be committed. What "
            "docs/results/study-NAME holds is read anyway.",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train, measure and judge every run of a study, and write one page with the paper's tables beside ours.

    What is finished is skipped, what was cut short is taken up again: the same command goes on. Studies: smollm2-sums,
    easyvqa-vlm, paper-ds-qwen, paper-qwen2.5-vl, paper-qwen3-opsd.

    Examples:

      deltalens study smollm2-sums --scale small -o small/

      deltalens study smollm2-sums --only subnetworks --results docs/results/study-smollm2-sums

      deltalens study paper-ds-qwen --dry-run
    """
    from deltalens.study import Outcome, Runner, load_study, write_pages

    loaded = load_study(name, scale)
    folder = output or Path(f"study-{loaded.name}")
    kept = results or Path("docs/results") / f"study-{loaded.name}"
    say = (lambda line: None) if quiet else note
    runner = Runner(loaded, folder, results=kept if kept.is_dir() else None, report=say, quiet=quiet)
    Outcome(loaded, {}).check_references(load_study(name))
    if dry_run:
        _print_steps(runner, only)
        return
    if not report_only:
        runner.run(only)
    command = f"deltalens study {loaded.name if name == loaded.name else name}"
    command += f" --scale {scale}" if scale != "full" else ""
    made: dict[str, Any] = {"command": command, "versions": _versions(runner), "outdated": runner.outdated()}
    outcome = Outcome(loaded, runner.numbers())
    pages = write_pages(outcome, folder, made)
    if results is not None:
        runner.commit(results, command)
        write_pages(outcome, results, made)
    say(f"pages: {', '.join(str(page) for page in pages)}")


def _print_steps(runner: Runner, only: str | None) -> None:
    """Every step in order, and whether it has been made."""
    from deltalens.study import select

    steps = runner.with_parents(select(runner.plan, only))
    for step in steps:
        typer.echo(
            f"{'made' if runner.current(step) else 'to do':5}  {step.partition(':')[0]:10}  {step.partition(':')[2]}"
        )
    typer.echo(f"{len(steps)} steps, {sum(not runner.current(step) for step in steps)} to do")


def _versions(runner: Runner) -> list[str]:
    """The different versions and machines that made the records, one a line."""
    lines = []
    for step in runner.plan.steps:
        if runner.current(step):
            record = runner.records[step]
            made = record.get("made_with") or {}
            parts = [value if key == "machine" else f"{key} {value}" for key, value in made.items()]
            numbers = record["numbers"]
            if numbers.get("weights") == "float32" and numbers.get("autocast", "bfloat16") is None:
                parts.append("trained in float32 throughout, without autocast")
            lines.append(", ".join(parts))
    return list(dict.fromkeys(lines))
