"""safetensors: one file, an index with shards, or a bare folder of shards.

The header is read here rather than by `safetensors.safe_open`, because that maps the file and hands out tensors
of a framework: the resident set then grows with the file, and NumPy knows no bfloat16. pread into the caller's
buffer keeps memory at one tensor. Layout: https://huggingface.co/docs/safetensors (8-byte little-endian header
length, JSON header, data).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from deltalens.checkpoint.base import DTYPE_BYTES, TensorEntry, byte_range
from deltalens.checkpoint.formats.pread import FileReader
from deltalens.errors import CheckpointError

__all__ = ["SafetensorsSource", "shards_of_index"]

MAX_HEADER_BYTES = 100_000_000  # the library's own limit


class SafetensorsSource:
    """Tensors of one or more safetensors files, read by pread.

    Args:
        files: the shards, each a valid safetensors file.
        expected: where an index was read, tensor name → file name; every name must be in that file.

    Raises:
        CheckpointError: a file is absent, truncated or no safetensors file; a tensor is in two files, or the
            index names a tensor that its shard does not hold.
    """

    format = "safetensors"

    def __init__(self, files: list[Path], expected: Mapping[str, str] | None = None) -> None:
        self.files = tuple(files)
        self._entries: dict[str, TensorEntry] = {}
        self._offsets: dict[str, int] = {}
        self._reader = FileReader()
        for file in files:
            for name, entry, offset in _read_header(file):
                if name in self._entries:
                    raise CheckpointError(
                        f"{file}: tensor {name!r} is also in {self._entries[name].file.name}; "
                        "remove the file that does not belong to this checkpoint"
                    )
                self._entries[name], self._offsets[name] = entry, offset
        for name, shard in (expected or {}).items():
            if name not in self._entries or self._entries[name].file.name != Path(shard).name:
                raise CheckpointError(
                    f"{files[0].parent}: the index says that {shard} holds {name!r}, but it does not; "
                    "download the checkpoint again"
                )

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        return self._entries

    def read(
        self, name: str, buffer: np.ndarray | None = None, *, start: int = 0, count: int | None = None
    ) -> np.ndarray:
        entry = self._entries[name]
        begin, length = byte_range(entry, start, count)
        out = np.empty(length, np.uint8) if buffer is None else buffer[:length]
        self._reader.pread(entry.file, self._offsets[name] + begin, out, name)
        return out

    def close(self) -> None:
        self._reader.close()


def _read_header(file: Path) -> list[tuple[str, TensorEntry, int]]:
    """Name, entry and absolute byte offset of each tensor, in the order of the data."""
    try:
        with file.open("rb") as handle:
            total = os.fstat(handle.fileno()).st_size
            length = int.from_bytes(handle.read(8), "little")
            if total < 8 or length > min(total - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{file}: not a safetensors file, or cut short; download it again")
            header = json.loads(handle.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: there is no such file; is the download complete?") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: not a safetensors file (its header is no JSON)") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: not a safetensors file (its header is no JSON object)")
    header.pop("__metadata__", None)
    try:
        rows = [_entry(file, name, info, 8 + length) for name, info in header.items()]
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: its safetensors header is malformed; download it again") from None
    rows.sort(key=lambda row: row[2])
    for (name, entry, offset), (other, _, following) in pairwise(rows):
        if offset + entry.nbytes > following:
            raise CheckpointError(f"{file}: tensors {name!r} and {other!r} overlap; the file is damaged")
    if rows and rows[-1][2] + rows[-1][1].nbytes > total:
        raise CheckpointError(
            f"{file}: the file ends before tensor {rows[-1][0]!r} does; it was cut short, download it again"
        )
    return rows


def _entry(file: Path, name: str, info: Mapping[str, Any], base: int) -> tuple[str, TensorEntry, int]:
    begin, end = info["data_offsets"]
    if info["dtype"] not in DTYPE_BYTES:
        raise CheckpointError(f"{file}: tensor {name!r} has dtype {info['dtype']}, which deltalens does not know")
    entry = TensorEntry(name, info["dtype"], tuple(int(n) for n in info["shape"]), file)
    if begin < 0 or end - begin != entry.nbytes or any(n < 0 for n in entry.shape):
        raise CheckpointError(f"{file}: tensor {name!r} does not have the bytes its shape needs; the file is damaged")
    return name, entry, base + begin


def shards_of_index(index: Path) -> tuple[list[Path], dict[str, str]]:
    """Shard files and weight map of a `*.index.json` (safetensors or torch), each inside the index's own folder.

    Raises:
        CheckpointError: the index is malformed, or names a file that is absent or outside its folder.
    """
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f'{index}: not a checkpoint index (no usable "weight_map")') from None
    files = []
    for name in names:
        # Only the written path is held to the folder: in the Hub's cache the shards are links to blobs beside it.
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{index}: names {name!r}, which is not a file of its own folder; refused")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: names {name}, which is not there; is the download complete?")
        files.append(index.parent / name)
    return files, weight_map
