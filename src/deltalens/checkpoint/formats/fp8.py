"""Float8 weights that come with scales, dequantised to float32.

Three layouts, each told by shapes: one scale a tensor, one a row (compressed-tensors, `weight_scale`), and one a
block, whose size the config states (`quantization_config.weight_block_size`, DeepSeek's `weight_scale_inv`). In all
of them weight = float8 value × scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deltalens.checkpoint.base import TensorEntry, TensorSource, byte_range

__all__ = ["ScaledFloat8Source", "dequantise_float8"]

_SCALES = ("_scale_inv", "_scale")
_DTYPES = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
           "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "BF16": "bfloat16", "F16": "float16",
           "F32": "float32"}  # fmt: skip


def dequantise_float8(source: TensorSource, config: Mapping[str, Any]) -> tuple[TensorSource, tuple[str, ...]]:
    """The source with its scaled float8 weights as float32, and a note; the source itself where it has none.

    A float8 weight whose scale is missing, or of a layout not known here, stays as it is (and is then skipped).
    """
    entries = source.entries
    quantisation = config.get("quantization_config")
    block = quantisation.get("weight_block_size") if isinstance(quantisation, Mapping) else None
    scaled: dict[str, tuple[str, tuple[int, int]]] = {}
    for name, entry in entries.items():
        if not entry.dtype.startswith("F8") or len(entry.shape) != 2:
            continue
        for ending in _SCALES:
            scale = entries.get(name + ending)
            if scale and scale.dtype in _DTYPES and (tile := _tile(entry.shape, scale.shape, block)):
                scaled[name] = (scale.name, tile)
                break
    if not scaled:
        return source, ()
    return ScaledFloat8Source(source, scaled), (f"{len(scaled)} float8 weights were dequantised to float32",)


def _tile(shape: tuple[int, ...], scale: tuple[int, ...], block: Any) -> tuple[int, int] | None:
    """How many rows and columns one scale covers; None where that cannot be told."""
    m, n = shape
    if all(length == 1 for length in scale):
        return m, n
    if scale in ((m,), (m, 1)):
        return 1, n
    if isinstance(block, list) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block):
        rows, columns = block
        if scale == (-(-m // rows), -(-n // columns)):
            return rows, columns
    return None


class ScaledFloat8Source:
    """A source's tensors, the scaled float8 ones multiplied out; their scales are no tensors of their own.

    Args:
        inner: the stored tensors.
        scaled: weight name → name of its scale, and rows and columns that one scale covers.
    """

    def __init__(self, inner: TensorSource, scaled: Mapping[str, tuple[str, tuple[int, int]]]) -> None:
        self._inner, self._scaled = inner, dict(scaled)
        self.format: str = inner.format
        self.files: tuple[Path, ...] = inner.files
        scales = {scale for scale, _ in scaled.values()}
        self._entries = {
            name: TensorEntry(name, "F32", entry.shape, entry.file) if name in scaled else entry
            for name, entry in inner.entries.items()
            if name not in scales
        }

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        return self._entries

    def read(
        self, name: str, buffer: np.ndarray | None = None, *, start: int = 0, count: int | None = None
    ) -> np.ndarray:
        if name not in self._scaled:
            return self._inner.read(name, buffer, start=start, count=count)
        scale_name, (rows, columns) = self._scaled[name]
        m, n = self._entries[name].shape
        weight = self._values(name).reshape(m, n)
        grid = self._values(scale_name).reshape(-(-m // rows), -(-n // columns))
        for i, line in enumerate(grid):
            weight[i * rows : (i + 1) * rows] *= np.repeat(line, columns)[:n]
        begin, length = byte_range(self._entries[name], start, count)
        raw = weight.reshape(-1).view(np.uint8)[begin : begin + length]
        if buffer is None:
            return raw
        buffer[:length] = raw
        return buffer[:length]

    def _values(self, name: str) -> np.ndarray:
        import ml_dtypes

        kind = _DTYPES[self._inner.entries[name].dtype]
        dtype = getattr(ml_dtypes, kind) if hasattr(ml_dtypes, kind) else kind
        return self._inner.read(name).view(dtype).astype(np.float32)

    def close(self) -> None:
        self._inner.close()
