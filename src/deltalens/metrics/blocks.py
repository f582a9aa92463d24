"""A matrix as float64 blocks along its longer side, so that no float64 copy of a large tensor is ever held.

A side is prepared by `metrics.values.prepare`: uint16 bf16 words, float32 or float64. Blocks are oriented with
the longer side as rows: (b, d) with d = min(m, n); a wide matrix is seen through its transpose, which swaps left
and right. `long` and `short` name the two sides below; `Factorisation` and the callers turn them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from deltalens.metrics.values import delta_float64, to_float64

__all__ = ["Blocks", "at_hand", "block_slices", "cut", "delta_blocks", "is_tall", "value_blocks"]

Blocks = Callable[[], Iterable[tuple[slice, np.ndarray]]]

BLOCK_ELEMENTS = 1 << 20  # 8 MB in float64: large enough for BLAS, small beside any tensor that needs blocks


def is_tall(shape: tuple[int, int]) -> bool:
    """True where the rows are the longer side (or as long)."""
    return shape[0] >= shape[1]


def block_slices(shape: tuple[int, int]) -> Iterator[slice]:
    """Slices of the longer side, about `BLOCK_ELEMENTS` elements each."""
    length, width = max(shape), min(shape)
    step = max(1, BLOCK_ELEMENTS // max(width, 1))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def cut(values: np.ndarray, part: slice) -> np.ndarray:
    """The part of a matrix (m, n) along its longer side, contiguous, in the matrix's own orientation."""
    return values[part] if is_tall(values.shape) else np.ascontiguousarray(values[:, part])


def at_hand(blocks: Blocks, shape: tuple[int, int]) -> Blocks:
    """The same blocks, made once where they are one."""
    if len(list(block_slices(shape))) > 1:
        return blocks
    only = list(blocks())
    return lambda: only


def value_blocks(values: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(slice, float64 block (b, d)) of a matrix, longer side as rows. A block is good until the next one."""
    for part, out in _one_buffer(values.shape):
        to_float64(cut(values, part).reshape(-1), out.reshape(-1))
        yield part, out if is_tall(values.shape) else out.T


def delta_blocks(source: np.ndarray, trained: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(slice, float64 block (b, d)) of trained − source in the compare dtype's arithmetic, longer side as rows.

    A block is good until the next one.
    """
    for part, out in _one_buffer(source.shape):
        before, after = cut(source, part), cut(trained, part)
        delta_float64(before.reshape(-1), after.reshape(-1), out.reshape(-1))
        yield part, out if is_tall(source.shape) else out.T


def _one_buffer(shape: tuple[int, int]) -> Iterator[tuple[slice, np.ndarray]]:
    """Each slice and an array of its shape, in the matrix's own orientation: fresh memory for every block would cost
    as much as filling it."""
    buffer: np.ndarray | None = None
    for part in block_slices(shape):
        size = (part.stop - part.start) * min(shape)
        if buffer is None:  # the first is the largest
            buffer = np.empty(size)
        yield part, buffer[:size].reshape((-1, shape[1]) if is_tall(shape) else (shape[0], -1))
