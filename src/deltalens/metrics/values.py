"""How a tensor's stored bytes become the values that are compared, and their difference.

A prepared side is flat: uint16 (bf16 words) where the compare dtype is `bf16`, else float32, or float64 where the
tensor is stored so. Every function here lets go of the interpreter's lock while it works on whole tensors.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from math import ceil
from typing import Any, Literal

import numpy as np
from numba import njit, types

__all__ = [
    "COMPARE_DTYPES",
    "Compare",
    "ceil_share",
    "delta_float64",
    "narrow_single",
    "prepare",
    "round_threshold",
    "round_to_bf16",
    "to_float64",
    "widen_word",
    "word_values",
]

Compare = Literal["bf16", "stored", "fp32"]
COMPARE_DTYPES: tuple[Compare, ...] = ("bf16", "stored", "fp32")

_NUMPY_DTYPES: dict[str, np.dtype] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}


def _array(scalar: Any) -> Any:
    return types.Array(scalar, 1, "C", readonly=True)  # a writable array converts to this, not the reverse


# Explicit signatures: compiled once into the on-disk cache, loaded at import, never compiled in a worker's first call.
WORDS, SINGLES, DOUBLES = _array(types.uint16), _array(types.float32), _array(types.float64)
KERNEL: dict[str, Any] = {"nogil": True, "cache": True, "boundscheck": False}


@lru_cache(maxsize=4096)
def ceil_share(ratio: float, size: int) -> int:
    """⌈ratio · size⌉ with `ratio` read as the decimal that it is written as: 0.1 of 30 is 3 (in floats 4)."""
    return ceil(Fraction(repr(float(ratio))) * size)


# numba widens 32-bit integer arithmetic to 64 bits; the casts below bring it back, and with it the vector instructions.


@njit(**KERNEL)
def widen_word(word):  # type: ignore[no-untyped-def]
    """A bf16 word as float32, for use inside kernels."""
    return np.uint32(np.uint32(word) << np.uint32(16)).view(np.float32)


@njit(**KERNEL)
def narrow_single(value):  # type: ignore[no-untyped-def]
    """A float32 as the nearest bf16 word (in a uint32), ties to even, for use inside kernels."""
    bits = np.float32(value).view(np.uint32)
    high = np.uint32(bits >> np.uint32(16))
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + (high & np.uint32(1))) >> np.uint32(16))
    # Adding to a NaN's mantissa could carry it into ±0: truncate it, and set the quiet bit so that it stays a NaN.
    nan = np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint32(high | np.uint32(0x40)) if nan else rounded


@njit([types.void(SINGLES, types.uint16[::1])], **KERNEL)
def _round_words(values: np.ndarray, out: np.ndarray) -> None:
    for i in range(values.size):
        out[i] = np.uint16(narrow_single(values[i]))


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round a flat float32 array to bf16 words (uint16), to nearest, ties to even; overflow to ±Inf, NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
    out = np.empty(values.size, np.uint16)
    _round_words(values, out)
    return out


def word_values(words: np.ndarray) -> np.ndarray:
    """bf16 words (uint16, any shape) as float32, exactly."""
    return (np.asarray(words).astype(np.uint32) << np.uint32(16)).view(np.float32)


def prepare(raw: np.ndarray, dtype: str, compare: Compare) -> np.ndarray:
    """A tensor's stored bytes as the flat array that the metrics take.

    `raw` is uint8, one-dimensional; `dtype` is a safetensors code of `BF16`, `F16`, `F32`, `F64`. For `bf16` the
    result is uint16 words: a view of `raw` where it is stored so, else rounded to nearest even (float64 by way of
    float32, as torch's cast does). For `fp32` it is float32, for `stored` float32, or float64 for `F64`. A result may
    be a view of `raw`: a caller that reuses its buffer finishes with the result first.
    Raises KeyError for any other dtype: callers filter by `checkpoint.base.FLOAT_DTYPES`.
    """
    if dtype == "BF16":
        words = _aligned(raw, np.dtype("<u2"))
        return words if compare == "bf16" else word_values(words)
    values = _aligned(raw, _NUMPY_DTYPES[dtype])
    if compare == "stored" and dtype == "F64":
        return values
    with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond float32 becomes ±Inf, and is counted as such
        values = values.astype(np.float32, copy=False)
    return round_to_bf16(values) if compare == "bf16" else values


def _aligned(raw: np.ndarray, dtype: np.dtype) -> np.ndarray:
    values = raw.view(dtype)
    return values if values.flags.aligned else values.copy()


@lru_cache(maxsize=256)
def round_threshold(tau: float, compare: Compare, stored_dtype: str) -> float:
    """τ rounded to the dtype in which Δ is taken: 1.00136e-5 for 1e-5 in bf16, a value that Δ itself takes."""
    if compare == "bf16":
        return float(word_values(round_to_bf16(np.array([tau], np.float32)))[0])
    return float(tau) if compare == "stored" and stored_dtype == "F64" else float(np.float32(tau))


@njit([types.void(WORDS, WORDS, types.float64[::1])], **KERNEL)
def _delta_words(source: np.ndarray, trained: np.ndarray, out: np.ndarray) -> None:
    for i in range(source.size):
        difference = np.float32(widen_word(trained[i]) - widen_word(source[i]))
        out[i] = np.float64(widen_word(narrow_single(difference)))


@njit([types.void(SINGLES, SINGLES, types.float64[::1])], **KERNEL)
def _delta_singles(source: np.ndarray, trained: np.ndarray, out: np.ndarray) -> None:
    for i in range(source.size):
        out[i] = np.float64(np.float32(trained[i] - source[i]))


@njit([types.void(WORDS, types.float64[::1])], **KERNEL)
def _widen_words(values: np.ndarray, out: np.ndarray) -> None:
    for i in range(values.size):
        out[i] = np.float64(widen_word(values[i]))


def delta_float64(source: np.ndarray, trained: np.ndarray, out: np.ndarray) -> None:
    """Write Δ = trained − source into `out` (float64, contiguous, flat), subtracted in the compare dtype, then widened.

    Words subtract in float32 and round to bf16, which is bf16's own subtraction; float32 subtracts in float32.
    Where only one side is float64 the other is widened to it. All three have one length.
    """
    assert source.size == trained.size == out.size, (source.size, trained.size, out.size)
    if source.dtype == np.uint16:
        _delta_words(source, trained, out)
    elif source.dtype == trained.dtype == np.float32:
        _delta_singles(source, trained, out)
    else:
        np.subtract(trained, source, out=out)


def to_float64(values: np.ndarray, out: np.ndarray) -> None:
    """Write prepared values (uint16 words, float32 or float64, flat) into `out` (float64, contiguous, flat)."""
    assert values.size == out.size, (values.size, out.size)
    if values.dtype == np.uint16:
        _widen_words(values, out)
    else:
        out[:] = values
