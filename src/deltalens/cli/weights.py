"""Commands that look at weights: analyze."""

from __future__ import annotations

import gc
import json
import sys
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
    Trained,
    app,
    bar,
    numbers,
    print_analysis,
)
from deltalens.errors import DeltalensError

__all__ = ["analyze"]


def _load_quickly() -> None:
    """Load what counting coordinates needs, which else takes longer than counting a small model's.

    The garbage collector is held off: it would walk the libraries' objects, none of them garbage, again and again.
    And numba imports SciPy's linear algebra with its first kernel, in case one multiplies matrices; none here does, so
    it is refused. Afterwards it can be imported by whoever wants it.
    """
    refused = "scipy.linalg" not in sys.modules
    if refused:
        sys.modules["scipy.linalg"] = None  # type: ignore[assignment]  # how one says that there is none
    gc.disable()
    try:
        import deltalens.analysis  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()
        if refused:
            del sys.modules["scipy.linalg"]


@app.command()
def analyze(
    source: Source,
    trained: Trained,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Write tables, summary and report.html there.")
    ] = None,
    threshold: Threshold = 1e-5,
    compare_dtype: Annotated[
        str | None,
        typer.Option(
            help="bf16 (default) casts both sides first; stored (default for LoRA) as saved; fp32 in float32."
        ),
    ] = None,
    spectrum: Spectrum = "exact",
    ratios: Ratios = "0.01,0.05,0.1,0.2",
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
    permutations: Annotated[
        int,
        typer.Option(min=0, metavar="K", help="Permuted copies of each update: z-scores of projections, rotations."),
    ] = 0,
    permutation: Annotated[
        str, typer.Option(help="sign flips signs in place; exponent moves updates among weights of one exponent.")
    ] = "sign",
    include: Include = None,
    exclude: Exclude = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    jobs: Jobs = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray: a task a tensor on a Ray cluster (pip install 'deltalens[ray]').")
    ] = "local",
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Take up an unfinished analysis in DIR, or start again.")
    ] = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure what training did to a model's weights, and print it beside the paper's published runs.

    Examples:

      deltalens analyze base/ trained/ -o out/

      deltalens analyze Qwen/Qwen3-1.7B-Base ./my-opd-run -o out/ --null-draws 3

      deltalens analyze base/ trained/ --permutations 20 --include '*.mlp.*'

      deltalens analyze base/ trained/ --spectrum none --json | jq .global.sparsity
    """
    if spectrum == "none":
        _load_quickly()
    from deltalens.analysis import Settings
    from deltalens.analysis import analyze as run

    try:
        settings = Settings(
            threshold=threshold,
            compare_dtype=compare_dtype,  # type: ignore[arg-type]  # checked by Settings
            spectrum=spectrum,  # type: ignore[arg-type]
            ratios=numbers(ratios),
            mask_rank=mask_rank,
            mask_share=mask_share,
            null_draws=null_draws,
            permutations=permutations,
            permutation=permutation,  # type: ignore[arg-type]
            device=device,
        )
    except DeltalensError:
        raise
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with bar("analyzing", quiet or as_json) as progress:
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
            engine=engine,
            resume=resume,
            progress=progress,
        )
    if as_json:
        print(json.dumps(result.summary, allow_nan=False))
    elif not quiet:
        print_analysis(result, output)
