"""What every checkpoint format offers: named tensors, and the bytes of one tensor at a time.

NumPy has no bfloat16 and no float8, so a tensor travels as raw little-endian bytes and a dtype code,
the codes of safetensors ("BF16", "F32", "F8_E4M3", "I64", …).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

__all__ = ["DTYPE_BYTES", "FLOAT_DTYPES", "Checkpoint", "TensorEntry", "TensorSource", "byte_range"]

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor: its name, dtype code (safetensors'), shape, and the file that holds it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of stored bytes."""
        return self.size * DTYPE_BYTES[self.dtype]


def byte_range(entry: TensorEntry, start: int, count: int | None) -> tuple[int, int]:
    """Offset and length in bytes of `count` elements (None: all that follow) from element `start` of a tensor."""
    count = entry.size - start if count is None else count
    assert 0 <= start <= start + count <= entry.size, (entry.name, start, count)
    width = DTYPE_BYTES[entry.dtype]
    return start * width, count * width


class TensorSource(Protocol):
    """What a format's reader gives; one implementation a format, under `checkpoint.formats`."""

    format: str
    files: tuple[Path, ...]

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every tensor, in the order of the files."""

    def read(
        self, name: str, buffer: np.ndarray | None = None, *, start: int = 0, count: int | None = None
    ) -> np.ndarray:
        """The bytes of a tensor, or of `count` of its elements from `start` on (row-major), as a flat uint8 array.

        Where `buffer` (uint8, at least as long) is given, the bytes land in it and a view of it is returned;
        the caller owns it. May be called from several threads at once. Raises `CheckpointError` naming file and
        tensor when the bytes cannot be had.
        """

    def close(self) -> None:
        """Let go of open files."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: its tensors, its config.json, and where it came from.

    `notes` holds what a reader must tell the user (for instance that GGUF blocks were dequantised).
    """

    path: str
    tensors: TensorSource
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def format(self) -> str:
        return self.tensors.format

    @property
    def files(self) -> tuple[Path, ...]:
        return self.tensors.files

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        return self.tensors.entries

    @property
    def read(self) -> Callable[..., np.ndarray]:
        return self.tensors.read

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(L, R) in float32 with L · R the tensor's whole update, where the format knows it (a LoRA adapter)."""
        known = getattr(self.tensors, "factors", None)
        return known(name) if known else None

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def parameters(self) -> int:
        """Number of elements of all stored tensors."""
        return sum(entry.size for entry in self.entries.values())

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.tensors.close()
