"""Commands for subnetworks: mask, intervene."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltalens.cli.common import Quiet, Source, Threshold, Trained, app, bar, note

if TYPE_CHECKING:
    from deltalens.subnetwork import SubnetworkMask

__all__ = ["intervene", "mask"]

SCOPE = "tensor: the largest entries of each matrix; global: of all tensors together."


@app.command()
def mask(
    source: Source,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The mask file.")],
    select: Annotated[
        str,
        typer.Option(
            metavar="RULE",
            help="visible, top:F, random:F, rounding:F, low-magnitude:F, high-magnitude:F, principal:F, "
            "off-principal:F, fisher:F (F a fraction), first:STEPS, union:A,B, intersection:A,B, complement:A.",
        ),
    ],
    trained: Annotated[
        str | None,
        typer.Argument(
            metavar="[TRAINED]",
            help="For visible and top: the checkpoint that training gave; for first: "
            "the folder with its checkpoint-N or steps/step-N folders.",
        ),
    ] = None,
    like: Annotated[
        Path | None, typer.Option(metavar="MASK", help="Match that mask's densities, instead of a fraction.")
    ] = None,
    scope: Annotated[str, typer.Option(help=f"Of top and fisher. {SCOPE}")] = "tensor",
    roles: Annotated[
        str | None, typer.Option(metavar="ROLES", help="Only these: attention,ffn,embedding,lm_head,norm,vision,other.")
    ] = None,
    layers: Annotated[str | None, typer.Option(metavar="LAYERS", help="Only these: 0-5, or 0,3,8-11.")] = None,
    threshold: Threshold = 1e-5,
    compare_dtype: Annotated[
        str | None, typer.Option(help="bf16 (default), stored (default for LoRA) or fp32, as in analyze.")
    ] = None,
    task: Annotated[str, typer.Option(help="Of fisher: whose answers' gradients are squared.")] = "sums",
    examples: Annotated[int, typer.Option(min=1, help="Of fisher: how many answers.")] = 64,
    seed: Annotated[int, typer.Option(help="Of every draw, those among ties too.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Choose a subnetwork of SOURCE by a rule, and write it as a mask of one bit a weight.

    Examples:

      deltalens mask base/ trained/ -o visible.mask --select visible

      deltalens mask base/ -o control.mask --select rounding --like visible.mask

      deltalens mask base/ -o low.mask --select low-magnitude:0.175 --roles attention,ffn

      deltalens mask base/ run/ -o early.mask --select first:6

      deltalens mask base/ -o both.mask --select union:visible.mask,low.mask
    """
    from deltalens.metrics.values import COMPARE_DTYPES
    from deltalens.subnetwork import select_mask

    if compare_dtype not in (None, *COMPARE_DTYPES):
        raise typer.BadParameter(f"--compare-dtype {compare_dtype}: choose {', '.join(COMPARE_DTYPES)}")
    with bar("selecting", quiet, counts="weights") as progress:
        made = select_mask(
            source,
            trained,
            rule=select,
            like=like,
            scope=scope,  # type: ignore[arg-type]  # checked by select_mask
            roles=roles,
            layers=layers,
            threshold=threshold,
            compare_dtype=compare_dtype,
            task=task,
            examples=examples,
            seed=seed,
            progress=progress,
        )
        made.save(output)
    if not quiet:
        _print_densities(made)
        note(f"{output}: {made.rule}; density {made.total_density():.4%}, {output.stat().st_size / 1e6:,.1f} MB")


def _print_densities(made: SubnetworkMask) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("role", "tensors", "weights", "in the mask", "density", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for role, (tensors, size, count) in made.by_role().items():
        table.add_row(role, f"{tensors:,}", f"{size:,}", f"{count:,}", f"{count / max(1, size):.2%}")
    Console(stderr=True).print(table)


@app.command()
def intervene(
    source: Source,
    trained: Trained,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The folder to write; must be new.")],
    keep: Annotated[
        str,
        typer.Option(
            metavar="RULE",
            help="top:F, mask:FILE, rank:K, principal[:RATIO], off-principal[:RATIO], role:ffn,attention, layers:0-5, "
            "scale:ALPHA.",
        ),
    ],
    scope: Annotated[str, typer.Option(help=f"Of top. {SCOPE}")] = "tensor",
    seed: Annotated[int, typer.Option(help="Of the draws among ties of top.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Write TRAINED with only a part of its update; the rest goes back to SOURCE's bits.

    Examples:

      deltalens intervene base/ trained/ -o top10/ --keep top:0.1

      deltalens intervene base/ trained/ -o rank16/ --keep rank:16

      deltalens intervene base/ trained/ -o ffn/ --keep role:ffn && deltalens eval ffn/ --task sums
    """
    from deltalens.subnetwork import intervene as run

    with bar("writing", quiet, counts="weights") as progress:
        done = run(source, trained, output, keep=keep, scope=scope, seed=seed, progress=progress)  # type: ignore[arg-type]
    if not quiet:
        share = "TRAINED is SOURCE" if done.kept is None else f"{done.kept:.2%} of ‖Δ‖² kept"
        meant = done.meant_energy / done.trained_energy if done.trained_energy else 0.0
        if done.kept is not None and abs(meant - done.kept) > 5e-5:
            share += f" ({meant:.2%} before rounding)"
        note(f"{output}: {done.keep}; {share}, {done.changed:,} of {done.trained_changed:,} changed weights")
        if done.untouched:
            note(f"as in TRAINED, since SOURCE has nothing to go back to: {', '.join(done.untouched[:5])}")
