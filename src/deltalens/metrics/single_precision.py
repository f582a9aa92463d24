"""Float32 twins of the passes over a large matrix: blocks, Gram matrix, image of Δ.

Matrix products in float32 take half the time of float64, and the 1 % that `--spectrum fast` asks for leaves room for
it. Blocks are scaled by a power of two so that squares of small updates do not underflow; orientation is that of
`metrics.blocks`: the longer side as rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numba
import numpy as np

from deltalens.metrics.alignment import DeltaPass
from deltalens.metrics.blocks import cut, is_tall
from deltalens.metrics.lapack import add_gram, mirror
from deltalens.metrics.spectrum import Factorisation
from deltalens.metrics.values import KERNEL, WORDS, narrow_single, widen_word

__all__ = [
    "SingleBlocks",
    "gram_single",
    "long_vectors",
    "power_of_two_scale",
    "single_delta_blocks",
    "single_delta_pass",
    "single_value_blocks",
]

BLOCK_ELEMENTS = 1 << 21  # 8 MB: four times as much gains no time


SingleBlocks = Callable[[], Iterator[tuple[slice, np.ndarray]]]


def power_of_two_scale(energy: float, size: int) -> float:
    """The power of two that brings the root mean square of `size` values of squared norm `energy` near 1."""
    rms = (energy / size) ** 0.5
    return 2.0 ** -round(float(np.log2(rms))) if rms > 0 else 1.0


def _slices(shape: tuple[int, ...]) -> Iterator[slice]:
    length, width = max(shape), min(shape)
    step = max(1, BLOCK_ELEMENTS // max(width, 1))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def single_value_blocks(values: np.ndarray, scale: float) -> Iterator[tuple[slice, np.ndarray]]:
    """(slice, float32 block (b, d)) of a prepared matrix times `scale`, longer side as rows.

    A block is good until the next one: one buffer serves all.
    """
    buffer = np.empty(0, np.float32)
    for part in _slices(values.shape):
        piece = cut(values, part)
        buffer = _at_least(buffer, piece.size)
        out = buffer[: piece.size].reshape(piece.shape)
        if piece.dtype == np.uint16:
            _scaled_words(piece.reshape(-1), np.float32(scale), out.reshape(-1))
        else:
            np.multiply(piece, scale, out=out, casting="same_kind")
        yield part, out if is_tall(values.shape) else out.T


def single_delta_blocks(source: np.ndarray, trained: np.ndarray, scale: float) -> Iterator[tuple[slice, np.ndarray]]:
    """(slice, float32 block (b, d)) of (trained − source) · `scale`, subtracted in the compare dtype's arithmetic.

    A block is good until the next one: one buffer serves all.
    """
    buffer = np.empty(0, np.float32)
    for part in _slices(source.shape):
        before, after = cut(source, part), cut(trained, part)
        buffer = _at_least(buffer, before.size)
        out = buffer[: before.size].reshape(before.shape)
        if before.dtype == np.uint16:
            _scaled_delta_words(before.reshape(-1), after.reshape(-1), np.float32(scale), out.reshape(-1))
        else:
            np.multiply(after - before, scale, out=out, casting="same_kind")
        yield part, out if is_tall(source.shape) else out.T


def _at_least(buffer: np.ndarray, size: int) -> np.ndarray:
    return buffer if buffer.size >= size else np.empty(size, np.float32)


@numba.njit([numba.void(WORDS, numba.float32, numba.float32[::1])], **KERNEL)
def _scaled_words(words, scale, out):  # type: ignore[no-untyped-def]
    for i in range(words.size):
        out[i] = widen_word(words[i]) * scale


@numba.njit([numba.void(WORDS, WORDS, numba.float32, numba.float32[::1])], **KERNEL)
def _scaled_delta_words(source, trained, scale, out):  # type: ignore[no-untyped-def]
    for i in range(source.size):
        difference = np.float32(widen_word(trained[i]) - widen_word(source[i]))
        out[i] = widen_word(narrow_single(difference)) * scale


def gram_single(blocks: SingleBlocks, width: int) -> np.ndarray:
    """Σ blockᵀ·block, (d, d) float32; an eigenvalue carries an absolute error of some 1e-7 of the largest."""
    total = np.zeros((width, width), np.float32)
    for _, block in blocks():
        add_gram(total, block)
    return mirror(total)


def long_vectors(blocks: SingleBlocks, short: np.ndarray, values: np.ndarray, length: int) -> np.ndarray:
    """(length, k) float32: block · short / values, the singular vectors of the longer side."""
    top = max(float(values[0]), 1e-300)
    scaled = (short * np.divide(1.0, values, out=np.zeros_like(values), where=values > 1e-6 * top)).astype(np.float32)
    out = np.empty((length, scaled.shape[1]), np.float32)
    for part, block in blocks():
        np.matmul(block, scaled, out=out[part])
    return out


def single_delta_pass(blocks: SingleBlocks, gram: np.ndarray, source: Factorisation) -> DeltaPass:
    """Δ in the source's top-K bases from one pass: ‖Δv‖² is vᵀΔᵀΔv, and UᵀΔV is (UᵀΔ)V.

    Args:
        blocks: of Δ, float32.
        gram: (d, d) float32, ΔᵀΔ.
        source: its leading factors, float32.
    """
    on_long = np.zeros((source.long.shape[1], gram.shape[0]), np.float32)
    for part, block in blocks():
        on_long += source.long[part].T @ block
    short_energy = np.einsum("dk,dk->k", source.short, gram @ source.short, dtype=np.float64)
    return DeltaPass(
        np.einsum("kd,kd->k", on_long, on_long, dtype=np.float64),
        np.maximum(short_energy, 0),
        (on_long @ source.short).astype(np.float64),
    )
