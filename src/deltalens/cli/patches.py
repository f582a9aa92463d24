"""Commands that carry a run as a patch: pack, apply, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltalens.cli.common import Jobs, Quiet, Source, Trained, app, bar, note

__all__ = ["apply", "pack", "verify"]


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
    jobs: Jobs = None,
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
            note(f"{output}: {changed:,} changed words, {output.stat().st_size / 1e6:,.1f} MB")
        return
    if layout != "deltalens":
        raise typer.BadParameter(f"--format {layout}: choose deltalens, vllm or safetensors")
    with bar("packing", quiet) as progress:
        done = patch.pack(source, trained, output, fast=fast, jobs=jobs, progress=progress)
    if not quiet:
        codecs = ", ".join(f"{count} {name}" for name, count in sorted(done.codecs.items(), key=lambda item: -item[1]))
        note(
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
    jobs: Jobs = None,
    quiet: Quiet = False,
) -> None:
    """Write the trained checkpoint from SOURCE and its patches; SOURCE is only read, every hash is checked.

    A run that was cut short goes on where it stopped with the same command.

    Examples:

      deltalens apply base/ run.patch -o trained/

      deltalens apply base/ step-1.patch step-2.patch -o step-2/
    """
    from deltalens import patch

    with bar("applying", quiet) as progress:
        done = patch.apply(source, patches, output, jobs=jobs, progress=progress)
    if not quiet:
        again = f", {done.resumed} of them there already" if done.resumed else ""
        note(f"{output}: {done.tensors} tensors{again}, {done.changed} changed, {done.bytes / 1e6:,.1f} MB, checked")


@app.command()
def verify(
    source: Source,
    patches: Patches,
    jobs: Jobs = None,
    quiet: Quiet = False,
) -> None:
    """Check whether patches would apply to SOURCE, and to what, without writing anything.

    Examples:

      deltalens verify base/ run.patch
    """
    from deltalens import patch

    with bar("verifying", quiet) as progress:
        done = patch.verify(source, patches, jobs=jobs, progress=progress)
    if not quiet:
        note(f"applies: {done.tensors} tensors, {done.changed} changed, result {done.result_hash}")
