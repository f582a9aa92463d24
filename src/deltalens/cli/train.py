"""`deltalens train`: a run from a YAML file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from deltalens.cli.common import Quiet, app, note

__all__ = ["train_model"]


@app.command("train")
def train_model(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see examples/.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="The run's folder; by default runs/CONFIG.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Instead of what the file says.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on after what an earlier call did, or start again.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the config and print it in full.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train a model: on-policy distillation, self-distillation, SFT, sequence-level distillation or GRPO.

    A run that was killed goes on with the same command. Over several processes: `accelerate launch -m deltalens train`.

    Examples:

      deltalens train examples/opd-sums.yaml

      deltalens train examples/opd-sums.yaml --set seed=1 --set loss=k1 -o runs/opd-k1
    """
    from deltalens.train.config import load_config

    run = load_config(config, overrides)
    if dry_run:
        import yaml

        typer.echo(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False), nl=False)
        return
    from deltalens.train.run import train

    quiet = quiet or os.environ.get("RANK", "0") != "0"  # of several processes the first one speaks
    folder = output or run.output or Path("runs") / config.stem
    done = train(run, folder, fresh=not resume, quiet=quiet)
    if not quiet:
        last = f"loss {done.log[0]['loss']:.4g} → {done.log[-1]['loss']:.4g}" if done.log else "no steps"
        note(f"{done.model}: {len(done.log)} steps, {last}")
        note(f"next: deltalens analyze {done.source} {done.model} -o {folder / 'analysis'}")
