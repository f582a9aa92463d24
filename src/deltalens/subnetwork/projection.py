"""`project:K`: gradients projected on the leading right singular directions of an early update.

The companion paper's control ("On the Geometry of On-Policy Distillation", arXiv 2606.07082): a run's subspace locks
early, so training inside the early checkpoint's top-K right subspace should get as far. It saves no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from deltalens.checkpoint import FLOAT_DTYPES, Checkpoint, open_checkpoint
from deltalens.errors import CheckpointError, ConfigError
from deltalens.metrics.blocks import delta_blocks, is_tall
from deltalens.metrics.spectrum import factorise
from deltalens.metrics.values import prepare

__all__ = ["Projection"]

RESOLVED = 1e-6  # singular values under this share of the largest carry no direction of an update in bf16


class Projection:
    """Each gradient matrix G (m × n) becomes G V Vᵀ, V (n × K) orthonormal; tensors without V are not trained.

    Has the methods of a mask that the compact optimizers use, so it stands where a `SubnetworkMask` does. The
    optimizer's arithmetic (Adam's division, say) may leave the subspace again, as in the paper.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], bases: Mapping[str, np.ndarray], *, rule: str) -> None:
        """
        Args:
            shapes: (m, n) of every matrix that is trained.
            bases: V of each, float (n, K), orthonormal columns.
            rule: how it was made, for people.
        """
        assert shapes.keys() == bases.keys()
        self._shapes = {name: (int(m), int(n)) for name, (m, n) in shapes.items()}
        self._bases = {name: np.ascontiguousarray(basis, np.float32) for name, basis in bases.items()}
        self.rule = rule

    @classmethod
    def from_update(cls, source: str | Path | Checkpoint, early: str | Path | Checkpoint, k: int) -> Projection:
        """From the right singular vectors of Δ = early − source, matrix by matrix, in float64.

        Args:
            source: what training starts from.
            early: a checkpoint of a run from it, with the same tensor names.
            k: directions a matrix; all where it has fewer. A direction that Δ does not have is left out, and a matrix
                that has not moved is not trained.

        Raises:
            CheckpointError: they cannot be read, do not fit, or no matrix has moved.
            ConfigError: `k` is not positive.
        """
        if k < 1:
            raise ConfigError(f"project:{k}: the number of directions must be positive")
        if not isinstance(source, Checkpoint):
            with open_checkpoint(source) as opened:
                return cls.from_update(opened, early, k)
        if not isinstance(early, Checkpoint):
            with open_checkpoint(early) as opened:
                return cls.from_update(source, opened, k)
        shapes, bases = {}, {}
        for name, entry in source.entries.items():
            if len(entry.shape) != 2 or entry.dtype not in FLOAT_DTYPES or not entry.size:
                continue
            if name not in early.entries or early.entries[name].shape != entry.shape:
                raise CheckpointError(f"{early.path}: has no tensor {name!r} of shape {entry.shape}; "
                                      f"give a checkpoint of a run from {source.path}")  # fmt: skip
            basis = _right_directions(source, early, name, k)
            if basis.shape[1]:
                shapes[name], bases[name] = (entry.shape[0], entry.shape[1]), basis
        if not bases:
            raise CheckpointError(f"{early.path}: no matrix differs from {source.path}: there is no update to follow")
        return cls(shapes, bases, rule=f"project:{k}")

    def names(self) -> list[str]:
        """Matrices that are trained, in the source's order."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """(m, n)."""
        return self._shapes[name]

    def count(self, name: str) -> int:
        """m · n: every coordinate may move."""
        m, n = self._shapes[name]
        return m * n

    def dense(self, name: str) -> np.ndarray:
        """bool (m, n), all true."""
        return np.ones(self._shapes[name], np.bool_)

    def basis(self, name: str) -> np.ndarray:
        """V, float32 (n, K)."""
        return self._bases[name]


def _right_directions(source: Checkpoint, early: Checkpoint, name: str, k: int) -> np.ndarray:
    """(n, at most k), float64, orthonormal."""
    sides = [(side.read(name), side.entries[name].dtype) for side in (source, early)]
    shape = source.entries[name].shape
    before, after = (prepare(raw, dtype, "fp32").reshape(shape) for raw, dtype in sides)
    m, n = shape
    found = factorise(lambda: delta_blocks(before, after), max(m, n), min(m, n), min(k, m, n))
    right = found.short if is_tall((m, n)) else found.long
    values = found.values[: right.shape[1]]
    return right[:, values > RESOLVED * max(float(values[0]), np.finfo(float).tiny)]
