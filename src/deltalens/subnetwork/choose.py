"""Which entries of one matrix or vector a rule selects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal
from zlib import crc32

import numpy as np

from deltalens.checkpoint import Checkpoint, TensorPair
from deltalens.errors import CheckpointError
from deltalens.metrics.rounding_null import fine_histogram, fit
from deltalens.metrics.values import Compare, ceil_share, delta_float64, prepare, round_threshold
from deltalens.subnetwork.draw import TIE_TOLERANCE, largest, rank_of, reconstruction, rounding_scores
from deltalens.subnetwork.mask import SubnetworkMask
from deltalens.subnetwork.rules import Rule

__all__ = ["Plan", "choose", "finite", "row_values", "scores"]

_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What each row's choice depends on beside its values."""

    rule: Rule
    share: float | None
    like: SubnetworkMask | None
    threshold: float
    compare: Compare
    seed: int
    fisher: dict[str, np.ndarray]

    def rng(self, row: TensorPair) -> np.random.Generator:
        """A row's own stream of draws, so that it does not depend on which other rows are selected."""
        return np.random.default_rng([self.seed, crc32(row.name.encode())])

    def count(self, row: TensorPair) -> int:
        if self.like is None:
            assert self.share is not None, "a rule with a fraction has one, or a mask to match"
            return ceil_share(self.share, row.count)
        if row.source_name not in self.like:
            return 0
        flat = self.like.flat(row.source_name)
        return int(np.count_nonzero(flat[row.source_start : row.source_start + row.count]))

    def rank(self, row: TensorPair) -> int:
        """The rank of the reconstruction: from the same ratio as the share of the entries."""
        assert len(row.shape) == 2, row.shape
        return rank_of(self.count(row) / row.count if self.share is None else self.share, row.shape)


def choose(before: Checkpoint, after: Checkpoint, row: TensorPair, plan: Plan) -> np.ndarray:
    """bool[count]: the row's mask."""
    kind = plan.rule.kind
    if kind in ("visible", "first"):
        return _visible(before, after, row, plan)
    count, rng = plan.count(row), plan.rng(row)
    if count in (0, row.count):
        return np.full(row.count, count > 0)
    if kind == "random":
        return largest(rng.random(row.count, np.float32), count, rng)
    if kind in ("top", "fisher"):
        return largest(scores(before, after, row, plan), count, rng)
    if kind == "rounding":
        return _drawn_by_rounding(before, row, plan, count, rng)
    values = finite(row_values(before, row, "source", "stored"), row, before)
    if "magnitude" in kind or not row.is_matrix:  # a vector is its own reconstruction
        size = np.abs(values)
        return largest(size if kind in ("high-magnitude", "principal") else -size, count, rng)
    size = reconstruction(values.reshape(row.shape), plan.rank(row)).reshape(-1)
    tolerance = TIE_TOLERANCE * float(size.max())
    if kind == "off-principal":
        np.negative(size, out=size)
    return largest(size, count, rng, tolerance)


def _visible(before: Checkpoint, after: Checkpoint, row: TensorPair, plan: Plan) -> np.ndarray:
    ours, theirs = row_values(before, row, "source", plan.compare), row_values(after, row, "trained", plan.compare)
    stored = "F64" if "F64" in (row.source_dtype, row.trained_dtype) else row.source_dtype
    tau = round_threshold(plan.threshold, plan.compare, stored)
    out, delta = np.empty(row.count, np.bool_), np.empty(min(_CHUNK, row.count))
    for start in range(0, row.count, _CHUNK):
        piece = slice(start, min(start + _CHUNK, row.count))
        part = delta[: piece.stop - start]
        delta_float64(ours[piece], theirs[piece], part)
        np.greater(np.abs(part, out=part), tau, out=out[piece])
    return out


def _drawn_by_rounding(
    before: Checkpoint, row: TensorPair, plan: Plan, count: int, rng: np.random.Generator
) -> np.ndarray:
    grid: Any = {"bf16": "bf16", "fp32": "fp32"}.get(plan.compare)
    grid = grid or {"BF16": "bf16", "F16": "fp16"}.get(row.source_dtype, "fp32")
    single = finite(row_values(before, row, "source", "fp32"), row, before)
    if plan.compare == "bf16":
        words = row_values(before, row, "source", "bf16") & np.uint16(0x7FFF)
    else:
        words = (single.view(np.uint32) >> 16).astype(np.uint16) & np.uint16(0x7FFF)
    fine = fine_histogram(single) if grid == "bf16" and row.source_dtype != "BF16" else None
    tau = round_threshold(plan.threshold, plan.compare, row.source_dtype)
    null = fit(np.bincount(words, minlength=1 << 15), count, tau, grid, fine=fine)
    assert null is not None, "0 < count < size"
    return largest(rounding_scores(words, null, rng), count, rng)


def scores(before: Checkpoint, after: Checkpoint, row: TensorPair, plan: Plan) -> np.ndarray:
    """What `top` and `fisher` rank by: non-negative, flat."""
    if plan.rule.kind == "top":
        return _magnitudes(before, after, row)
    return plan.fisher[row.source_name][row.source_start : row.source_start + row.count]


def _magnitudes(before: Checkpoint, after: Checkpoint, row: TensorPair) -> np.ndarray:
    """|Δ| of a row as stored, flat: float32, or float64 where a side is stored so. Refuses NaN and Inf."""
    with np.errstate(over="ignore", invalid="ignore"):
        delta = row_values(after, row, "trained", "stored") - row_values(before, row, "source", "stored")
    return finite(np.abs(delta, out=delta), row, after)


def row_values(side: Checkpoint, row: TensorPair, which: Literal["source", "trained"], compare: Compare) -> np.ndarray:
    name, start, dtype = (
        (row.source_name, row.source_start, row.source_dtype)
        if which == "source"
        else (row.trained_name, row.trained_start, row.trained_dtype)
    )
    return prepare(side.read(name, start=start, count=row.count), dtype, compare)


def finite(values: np.ndarray, row: TensorPair, side: Checkpoint) -> np.ndarray:
    if not np.isfinite(values).all():
        raise CheckpointError(f"{side.path}: tensor {row.name!r} holds NaN or Inf, which cannot be ranked")
    return values
