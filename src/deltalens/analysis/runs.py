"""Several runs of one source, opened together and matched tensor by tensor.

A tensor that one run lacks, or has in another shape, is compared for none: every number is then about the same
coordinates in all runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deltalens.analysis.analyze import checkpoint_files
from deltalens.analysis.engine import Gate
from deltalens.analysis.memory import SMALL_ELEMENTS
from deltalens.analysis.pair import Buffers
from deltalens.checkpoint import Checkpoint, Skipped, TensorPair, open_checkpoint, pair_checkpoints
from deltalens.checkpoint.base import DTYPE_BYTES
from deltalens.checkpoint.formats.peft import LoraSource
from deltalens.errors import CheckpointError
from deltalens.metrics.values import Compare, prepare

__all__ = ["RunSet", "RunTensor", "open_runs", "run_names"]


@dataclass(frozen=True, slots=True)
class RunTensor:
    """One row: the same matrix (or vector) in the source and in every run; `pairs` has one entry a run."""

    pairs: tuple[TensorPair, ...]

    @property
    def first(self) -> TensorPair:
        return self.pairs[0]

    @property
    def name(self) -> str:
        return self.first.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.first.shape

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.first.count

    @property
    def nbytes(self) -> int:
        """Bytes to read: the source once, each run once."""
        return self.count * (
            DTYPE_BYTES[self.first.source_dtype] + sum(DTYPE_BYTES[pair.trained_dtype] for pair in self.pairs)
        )


@dataclass(frozen=True, slots=True)
class RunSet:
    """An opened source, its opened runs with distinct names, and what they have in common."""

    source: Checkpoint
    runs: tuple[Checkpoint, ...]
    names: tuple[str, ...]
    tensors: list[RunTensor]
    skipped: list[Skipped]
    warnings: list[str]

    @property
    def all_lora(self) -> bool:
        """Whether every run is a LoRA adapter, whose update rounding would hide."""
        return all(isinstance(run.tensors, LoraSource) for run in self.runs)

    def files(self) -> list[list[dict[str, Any]]]:
        """The files of the source, then those of each run."""
        return [checkpoint_files(side) for side in (self.source, *self.runs)]

    def gate(self, copies: int) -> Gate:
        """A gate for work that holds `copies` 16-bit copies of a tensor at once: the largest tensor, and beside it
        what fits in four times its size in float32, or a few small ones."""
        largest = max((tensor.count for tensor in self.tensors), default=0)
        return Gate(max(largest, 8 * largest // copies) + 2 * SMALL_ELEMENTS // copies)

    def read(
        self, tensor: RunTensor, compare: Compare, buffers: Buffers
    ) -> tuple[np.ndarray, list[np.ndarray], np.ndarray | None]:
        """The prepared values of the source and of each run (flat), each read once.

        The third is the source in float32, flat, where it is stored finer than the bf16 that is compared.

        Raises:
            CheckpointError: a tensor's bytes cannot be read.
        """
        pair = tensor.first
        kept = tensor.count * (1 + len(self.runs)) <= 2 * SMALL_ELEMENTS
        raw = _read(self.source, pair.source_name, pair.source_start, pair.count, buffers, "source", compare, kept=kept)
        before = prepare(raw, pair.source_dtype, compare)
        fine = None
        if compare == "bf16" and pair.source_dtype != "BF16":
            fine = prepare(raw, pair.source_dtype, "fp32").copy()
        after = []
        for i, (run, pair) in enumerate(zip(self.runs, tensor.pairs, strict=True)):
            side = f"run {i}"
            raw = _read(run, pair.trained_name, pair.trained_start, pair.count, buffers, side, compare, kept=kept)
            after.append(prepare(raw, pair.trained_dtype, compare))
        return before, after, fine


def _read(
    checkpoint: Checkpoint,
    name: str,
    start: int,
    count: int,
    buffers: Buffers,
    side: str,
    compare: Compare,
    *,
    kept: bool,
) -> np.ndarray:
    dtype = checkpoint.entries[name].dtype
    nbytes = count * DTYPE_BYTES[dtype]
    if compare == "bf16" and dtype != "BF16":
        side = "cast"  # the bytes are cast into a new array: one buffer serves all sides
    # A thread keeps its buffers, which must not add up: large tensors, of which few are alive at once, get their own.
    buffer = buffers.take(side, nbytes) if kept else np.empty(nbytes, np.uint8)
    return checkpoint.read(name, buffer, start=start, count=count)


@contextmanager
def open_runs(
    source: str | Path, runs: Sequence[str | Path], *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Iterator[RunSet]:
    """Open a source and its runs, and match their tensors.

    Args:
        source, runs: directories, files, or Hub ids with an optional `@revision`.
        include, exclude: shell patterns on tensor names.

    Raises:
        CheckpointError: one cannot be read, cannot be compared with the source, or they share no tensor.
    """
    with ExitStack() as opened:
        before = opened.enter_context(open_checkpoint(source))
        after = tuple(opened.enter_context(open_checkpoint(run, base=before)) for run in runs)
        names = run_names([run.path for run in after])
        pairings = [pair_checkpoints(before, run, include=include, exclude=exclude) for run in after]
        skipped, said, warnings = [], set(), []
        for name, pairing in zip(names, pairings, strict=True):
            for one in pairing.skipped:
                if one.tensor not in said:  # mostly the same in every run
                    said.add(one.tensor)
                    skipped.append(Skipped(one.tensor, one.reason.replace("TRAINED", name)))
            # What is said of the source is said once.
            warnings += [text.replace("TRAINED", name) for text in pairing.warnings]
        tensors, uneven = _match([pairing.pairs for pairing in pairings], names)
        if not tensors:
            raise CheckpointError(
                f"{before.path}: no tensor has the same name and shape in all of {', '.join(names)}; compare runs of "
                "one model"
            )
        yield RunSet(before, after, names, tensors, skipped + uneven, list(dict.fromkeys(warnings)))


def _match(paired: Sequence[Sequence[TensorPair]], names: Sequence[str]) -> tuple[list[RunTensor], list[Skipped]]:
    """Tensors found in every run, in the first run's order; vocabularies are cut to the smallest."""
    by_name = [{pair.name: pair for pair in pairs} for pairs in paired]
    tensors, skipped = [], []
    everywhere = dict.fromkeys(pair.name for pairs in paired for pair in pairs)
    for name in everywhere:
        found = [pairs.get(name) for pairs in by_name]
        kept = [pair for pair in found if pair is not None]
        if len(kept) < len(found):
            lacking = [run for run, pair in zip(names, found, strict=True) if pair is None]
            skipped.append(Skipped(name, f"not comparable in {', '.join(lacking)}, and so in no run"))
            continue
        places = {(pair.source_name, pair.source_start, *pair.shape[1:]) for pair in kept}
        rows = min(pair.shape[0] for pair in kept)
        vocabulary = kept[0].role in ("embedding", "lm_head")
        if len(places) > 1 or (not vocabulary and any(pair.shape[0] != rows for pair in kept)):
            skipped.append(Skipped(name, "of another shape in some runs"))
            continue
        tensors.append(RunTensor(tuple(replace(pair, shape=(rows, *pair.shape[1:])) for pair in kept)))
    return tensors, skipped


def run_names(paths: Sequence[str]) -> tuple[str, ...]:
    """The last part of each path, with as much before it as makes it unique; equal paths are numbered."""
    parts = [[part for part in str(path).split("/") if part not in ("", ".")] or [str(path)] for path in paths]
    depth = [1] * len(parts)

    def names() -> list[str]:
        return ["/".join(part[-d:]) for part, d in zip(parts, depth, strict=True)]

    while True:
        current = names()
        clash = [i for i, name in enumerate(current) if current.count(name) > 1 and depth[i] < len(parts[i])]
        if not clash:
            break
        for i in clash:
            depth[i] += 1
    out: list[str] = []
    for name in current:
        number, unique = 2, name
        while unique in out:
            unique, number = f"{name}-{number}", number + 1
        out.append(unique)
    return tuple(out)
