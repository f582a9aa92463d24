"""What ties the checkpoints of one run together: mask growth, churn, and how alike their leading subspaces are.

Masks are of the visible updates, packed by `metrics.masks.pack_updates`; definitions in METRICS.md, "Along a run".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deltalens.metrics.blocks import is_tall
from deltalens.metrics.masks import count_bits
from deltalens.metrics.overlap import SUBSPACE, Subspaces
from deltalens.metrics.spectrum import Factorisation

__all__ = [
    "MaskHistory",
    "locked_index",
    "overlap",
    "product_subspaces",
    "subspaces",
]

RESOLVED = 1e-6  # σ/σ₁ below which a direction of Δ is rounding noise of its factorisation


def overlap(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """Sizes of the intersection and the union of two packed masks."""
    shared = count_bits(a, b)
    return shared, count_bits(a) + count_bits(b) - shared


class MaskHistory:
    """Follows one tensor's mask along a run; before the first checkpoint nothing is visible."""

    def __init__(self) -> None:
        self._previous: np.ndarray | None = None
        self._ever: np.ndarray | None = None

    def step(self, mask: np.ndarray) -> dict[str, int]:
        """Counts for the next checkpoint's packed mask, which is kept.

        `appeared`: visible now and not at the checkpoint before. `vanished`: the reverse. `returned`: of those that
        appeared, the ones that had been visible at an earlier checkpoint. `stepped`: visible at this checkpoint or
        the one before. `ever`: visible at any so far.
        """
        if self._previous is None or self._ever is None:
            self._previous = self._ever = np.zeros_like(mask)
        new = mask & ~self._previous
        counts = {
            "appeared": count_bits(new),
            "vanished": count_bits(self._previous, ~mask),
            "returned": count_bits(new, self._ever),
            "stepped": count_bits(mask | self._previous),
        }
        self._ever = self._ever | mask
        self._previous = mask
        return counts | {"ever": count_bits(self._ever)}


def subspaces(factors: Factorisation, shape: tuple[int, int], k: int = SUBSPACE) -> Subspaces:
    """The leading min(k, rank) directions of a factorised update of `shape`, in float64."""
    values = factors.values[: min(k, factors.long.shape[1])]
    rank = int(np.count_nonzero(values > RESOLVED * values[0])) if values.size and values[0] > 0 else 0
    long, short = (np.array(side[:, :rank], np.float64) for side in (factors.long, factors.short))
    return Subspaces(long, short) if is_tall(shape) else Subspaces(short, long)


def product_subspaces(left: np.ndarray, right: np.ndarray, k: int = SUBSPACE) -> Subspaces:
    """Those of left · right (m × r, r × n), from the r × r core."""
    q_left, r_left = np.linalg.qr(left.astype(np.float64))
    q_right, r_right = np.linalg.qr(right.T.astype(np.float64))
    u, values, vt = np.linalg.svd(r_left @ r_right.T)
    rank = int(np.count_nonzero(values[:k] > RESOLVED * values[0])) if values[0] > 0 else 0
    return Subspaces(q_left @ u[:, :rank], q_right @ vt[:rank].T)


def locked_index(similarities: Sequence[float | None], threshold: float) -> int | None:
    """The first checkpoint from which the similarity to the end stays above `threshold`.

    The last one is like itself whatever the run did: None where the similarity stays above from there only. An
    undefined similarity does not count as above.
    """
    first = len(similarities) - 1
    while first > 0:
        value = similarities[first - 1]
        if value is None or value <= threshold:
            break
        first -= 1
    return first if first < len(similarities) - 1 else None
