"""Reading byte ranges of files, and tensors that lie in one or more of them.

pread into the caller's buffer, never a mapped file: pages of a mapping count to the resident set, which then grows
with the checkpoint.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from deltalens.checkpoint.base import DTYPE_BYTES, TensorEntry, byte_range
from deltalens.errors import CheckpointError

__all__ = ["Chunk", "ChunkedSource", "FileReader"]


class FileReader:
    """File descriptors opened on first use; safe to share between threads, and to send to another process."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()

    def pread(self, file: Path, offset: int, out: np.ndarray, name: str) -> None:
        """Fill `out` (uint8, contiguous) with the file's bytes from `offset` on; `name` is for the message."""
        view, done, handle = memoryview(out.data), 0, self._handle(file)
        while done < len(view):
            got = os.preadv(handle, [view[done:]], offset + done)
            if got == 0:
                raise CheckpointError(f"{file}: the file ends inside tensor {name!r}; it was cut short")
            done += got

    def _handle(self, file: Path) -> int:
        with self._lock:
            if file not in self._handles:
                try:
                    self._handles[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
            return self._handles[file]

    def close(self) -> None:
        with self._lock:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]  # another process opens its own descriptors


@dataclass(frozen=True, slots=True)
class Chunk:
    """A block of a tensor as it lies in a file.

    `at` is the byte of its first element, `shape` and `stride` (in elements; None: row-major) its layout there,
    `offsets` the place of its first element in the whole tensor.
    """

    file: Path
    at: int
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    stride: tuple[int, ...] | None = None


class ChunkedSource:
    """Tensors made of chunks: torch files (one chunk a tensor), and sharded checkpoints.

    Args:
        format: the format's name.
        files: every file read.
        entries: the whole tensors.
        chunks: for each tensor the chunks that make it up.

    Raises:
        CheckpointError: a tensor's chunks do not cover it, so a shard is absent.
    """

    def __init__(
        self,
        format: str,
        files: Sequence[Path],
        entries: Mapping[str, TensorEntry],
        chunks: Mapping[str, Sequence[Chunk]],
    ) -> None:
        self.format, self.files = format, tuple(files)
        self._entries, self._reader = dict(entries), FileReader()
        self._chunks: dict[str, list[Chunk]] = {}
        for name, entry in entries.items():
            unique = {chunk.offsets: chunk for chunk in chunks[name] if prod(chunk.shape)}  # replicas hold the same
            if sum(prod(chunk.shape) for chunk in unique.values()) != entry.size:
                raise CheckpointError(
                    f"{entry.file.parent}: the shards of tensor {name!r} do not add up to its shape "
                    f"{list(entry.shape)}; is a shard missing?"
                )
            self._chunks[name] = list(unique.values())

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        return self._entries

    def read(
        self, name: str, buffer: np.ndarray | None = None, *, start: int = 0, count: int | None = None
    ) -> np.ndarray:
        entry, chunks = self._entries[name], self._chunks[name]
        begin, length = byte_range(entry, start, count)
        out = np.empty(length, np.uint8) if buffer is None else buffer[:length]
        if all(_is_row_range(chunk, entry.shape) for chunk in chunks):
            row = prod(entry.shape[1:]) * DTYPE_BYTES[entry.dtype]
            for chunk in chunks:
                first = chunk.offsets[0] * row if entry.shape else 0
                last = first + prod(chunk.shape) * DTYPE_BYTES[entry.dtype]
                low, high = max(first, begin), min(last, begin + length)
                if low < high:
                    self._reader.pread(chunk.file, chunk.at + low - first, out[low - begin : high - begin], name)
            return out
        whole = np.empty(entry.nbytes, np.uint8)
        grid = whole.view(f"V{DTYPE_BYTES[entry.dtype]}").reshape(entry.shape)
        for chunk in chunks:
            place = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.shape, strict=True))
            grid[place] = self._block(chunk, entry)
        out[:] = whole[begin : begin + length]
        return out

    def _block(self, chunk: Chunk, entry: TensorEntry) -> np.ndarray:
        width = DTYPE_BYTES[entry.dtype]
        stride = chunk.stride or tuple(prod(chunk.shape[i + 1 :]) for i in range(len(chunk.shape)))
        span = 1 + sum((n - 1) * s for n, s in zip(chunk.shape, stride, strict=True))
        raw = np.empty(span * width, np.uint8)
        self._reader.pread(chunk.file, chunk.at, raw, entry.name)
        return np.lib.stride_tricks.as_strided(
            raw.view(f"V{width}"), chunk.shape, [s * width for s in stride], writeable=False
        )

    def close(self) -> None:
        self._reader.close()


def _is_row_range(chunk: Chunk, shape: tuple[int, ...]) -> bool:
    """Whether the chunk is one run of the row-major whole, stored row-major."""
    return chunk.stride is None and chunk.shape[1:] == shape[1:] and not any(chunk.offsets[1:])
