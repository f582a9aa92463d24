"""One tensor along a run: its source read and factorised once, every checkpoint read once.

The last checkpoint comes first: with its mask and its leading subspaces at hand the others are compared with it as
they come, so that memory does not grow with their number.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from deltalens.analysis.fast import FastColumns
from deltalens.analysis.pair import Buffers, Measured, SourceSide, measure_against, read_source
from deltalens.analysis.runs import RunTensor
from deltalens.analysis.settings import Settings
from deltalens.analysis.spectral import SpectralColumns
from deltalens.checkpoint.base import Checkpoint
from deltalens.checkpoint.pairing import TensorPair
from deltalens.metrics.blocks import Blocks
from deltalens.metrics.coordinates import Coordinates
from deltalens.metrics.lapack import SymmetricEigen, leading_eigenvectors
from deltalens.metrics.masks import count_bits, pack_updates
from deltalens.metrics.overlap import SUBSPACE, Subspaces, subspace_similarity
from deltalens.metrics.random_values import subspace_similarity_random
from deltalens.metrics.randomised import RankEstimate
from deltalens.metrics.rounding_null import RoundingNull, excess
from deltalens.metrics.single_precision import long_vectors, single_delta_blocks
from deltalens.metrics.spectrum import Factorisation, factorise
from deltalens.metrics.trajectory import MaskHistory, overlap, product_subspaces, subspaces

__all__ = ["follow"]


@dataclass(slots=True)
class _Seen:
    """What is kept of a tensor at one checkpoint."""

    mask: np.ndarray | None = None  # packed
    packed: tuple[np.ndarray, np.ndarray] | None = None  # visible and nonzero updates, while the row is made
    density: float = 0.0
    null: RoundingNull | None = None
    update: Subspaces | None = None
    draws: list[Subspaces] = field(default_factory=list)
    draw_seconds: float = 0.0


class _Keeping(SpectralColumns):
    """Keeps the leading subspaces of Δ and of its null's draws."""

    kept: _Seen

    def _packed(self) -> tuple[np.ndarray, np.ndarray]:
        assert self.kept.packed is not None
        return self.kept.packed

    def _delta_columns(self) -> dict[str, Any]:
        if self.low_rank is not None and self.c.delta_energy > 0:
            self.kept.update = product_subspaces(*self.low_rank)
        return super()._delta_columns()

    def _simulated(self) -> dict[str, Any]:
        start = time.perf_counter()
        row = super()._simulated()
        self.kept.draw_seconds = time.perf_counter() - start
        return row

    def _keep(self, after: np.ndarray, factors: Factorisation) -> np.ndarray:
        found = subspaces(factors, self.before.shape)
        if after is self.after:
            self.kept.update = found
        else:
            self.kept.draws.append(found)
        return factors.values

    def _delta_values(self, after: np.ndarray, blocks: Blocks, eigen: SymmetricEigen) -> np.ndarray:
        return self._keep(after, factorise(blocks, self.length, self.width, min(SUBSPACE, self.width), eigen))


class _FastColumns(_Keeping, FastColumns):
    def _spectrum(self, gram: np.ndarray, scale: float) -> tuple[np.ndarray, RankEstimate]:
        top, rank = super()._spectrum(gram, scale)
        if self.low_rank is None:
            k = min(SUBSPACE, self.width)
            short = self.leading
            if short is None:
                short = leading_eigenvectors(gram.astype(np.float64), k)[1].astype(np.float32)
            short = np.ascontiguousarray(short[:, :k])
            blocks = partial(single_delta_blocks, self.before, self.after, scale)
            long = long_vectors(blocks, short, np.maximum(top[:k] * scale, 1e-30), self.length)
            self.kept.update = subspaces(Factorisation(long, top, short), self.before.shape)
        return top, rank


def follow(
    tensor: RunTensor,
    source: Checkpoint,
    checkpoints: Sequence[Checkpoint],
    settings: Settings,
    buffers: Buffers,
) -> Measured:
    """Every metric of one tensor at every checkpoint.

    Args:
        tensor: which, and where its bytes are.
        source, checkpoints: opened, in the run's order; the last one is the end.
        settings: what to compute.
        buffers: the calling thread's read buffers.

    Returns:
        a row of the tensor's `name`, and in `rows` a row of plain numbers for each checkpoint; `seconds` without the
        null's draws, and `draw_seconds`.

    Raises:
        CheckpointError: a tensor's bytes cannot be read.
    """
    started = time.perf_counter()
    side = read_source(tensor.first, source, settings, buffers)
    last = len(checkpoints) - 1
    rows: list[dict[str, Any]] = [{} for _ in checkpoints]
    rows[last], end = _at(tensor.pairs[last], side, checkpoints[last], settings, buffers, ())
    history = MaskHistory()
    start, draw_seconds = end, end.draw_seconds
    for i in range(last):
        row, here = _at(tensor.pairs[i], side, checkpoints[i], settings, buffers, (i + 1,))
        if i == 0:
            start = here
        draw_seconds += here.draw_seconds
        rows[i] = row | _mask_columns(here, end, history, tensor.count, same=False)
        rows[i] |= _subspace_columns(here, end, "end", same=False) | _subspace_columns(
            here, start, "start", same=i == 0
        )
    rows[last] |= _mask_columns(end, end, history, tensor.count, same=True)
    rows[last] |= _subspace_columns(end, end, "end", same=True) | _subspace_columns(end, start, "start", same=False)
    seconds = time.perf_counter() - started - draw_seconds
    row = {"name": tensor.name, "rows": rows, "seconds": seconds, "draw_seconds": draw_seconds}
    return Measured(row, {}, side.content_hash)


def _at(
    pair: TensorPair,
    side: SourceSide,
    checkpoint: Checkpoint,
    settings: Settings,
    buffers: Buffers,
    stream: tuple[int, ...],
) -> tuple[dict[str, Any], _Seen]:
    """The row that `analyze` would give, and what the other checkpoints are to be compared with."""
    kept = _Seen()

    def seen(
        before: np.ndarray, after: np.ndarray, tau: float, coordinates: Coordinates, null: RoundingNull | None
    ) -> None:
        kept.packed = pack_updates(before, after, tau)
        kept.mask = kept.packed[0]
        kept.density = coordinates.visible / coordinates.size
        kept.null = null

    def columns_of(*arguments: Any) -> SpectralColumns:
        columns = _FastColumns(*arguments) if settings.spectrum == "fast" else _Keeping(*arguments)
        columns.kept, columns.stream = kept, stream
        return columns

    row = measure_against(side, pair, checkpoint, settings, buffers, columns_of=columns_of, seen=seen, hashed=False).row
    kept.packed = None
    return row, kept


def _mask_columns(here: _Seen, end: _Seen, history: MaskHistory, size: int, *, same: bool) -> dict[str, Any]:
    """Counts behind mask growth and churn; none where the tensor is not finite at this checkpoint."""
    if here.mask is None:
        return {}
    row: dict[str, Any] = {f"{name}_count": value for name, value in history.step(here.mask).items()}
    if end.mask is None:
        return row
    row["intersection_end_count"], row["union_end_count"] = overlap(here.mask, end.mask)
    row["end_count"] = count_bits(end.mask)
    if same:
        return row | {"intersection_end_random": None, "intersection_end_null": None}
    row["intersection_end_random"] = here.density * end.density * size
    expected = None
    if here.null is not None and end.null is not None:  # of one source: their words are the same
        expected = float((here.null.weights * here.null.probability) @ end.null.probability)
    elif here.density in (0.0, 1.0) or end.density in (0.0, 1.0):
        expected = row["intersection_end_random"]  # nothing visible, or everything: there is no choice
    row["intersection_end_null"] = expected
    return row


def _subspace_columns(here: _Seen, other: _Seen, which: str, *, same: bool) -> dict[str, Any]:
    """Sim_16 of both sides with what chance and rounding give; these two are not asked of a checkpoint and itself."""
    row: dict[str, Any] = {}
    if here.update is None or other.update is None:
        return row
    for side in ("right", "left"):
        a, b = getattr(here.update, side), getattr(other.update, side)
        name = f"sim{SUBSPACE}_{side}_{which}"
        similar, k = subspace_similarity(a, b)
        row[name] = min(similar, 1.0) if similar is not None else None
        if k == a.shape[0]:  # they fill the space: alike whatever the updates are
            row[name] = None
        if same or row[name] is None:
            continue
        row[f"{name}_random"] = subspace_similarity_random(a.shape[0], k)
        drawn = [
            subspace_similarity(getattr(p, side), getattr(q, side))[0]
            for p, q in zip(here.draws, other.draws, strict=False)
        ]
        values = [value for value in drawn if value is not None]
        if values:
            row[f"{name}_null"] = float(np.mean(values))
            row[f"{name}_null_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
            row[f"{name}_excess"] = excess(row[name], row[f"{name}_null"])
    return row
