"""Writing a checkpoint: safetensors laid out by their header and filled a tensor at a time, and the other files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deltalens.checkpoint.base import DTYPE_BYTES, Checkpoint, TensorEntry

__all__ = ["INDEX", "WeightFile", "carried_files", "copy_files", "new_header", "sharded_as", "write_tensors"]

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp")
_FOREIGN_INDEX = ".bin.index.json"
_SAFETENSORS_INDEX = ".safetensors.index.json"


def new_header(entries: Sequence[TensorEntry]) -> bytes:
    """The JSON header of a safetensors file that holds these tensors, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    # The widest dtypes first, as safetensors' own writer does: every tensor is then aligned.
    for entry in sorted(entries, key=lambda e: (-DTYPE_BYTES[e.dtype], e.name)):
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    data = json.dumps(header, separators=(",", ":")).encode()
    return data + b" " * (-len(data) % 8)


class WeightFile:
    """A safetensors file made from its header, with room for its tensors; several threads may write at once.

    A file that is there already keeps the tensors that it holds. `nbytes`: bytes of all tensors. Offsets count from
    the start of the file. Every method raises OSError as the system does.
    """

    def __init__(self, path: Path, header: bytes, nbytes: int) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.write(0, np.frombuffer(len(header).to_bytes(8, "little") + header, np.uint8))
        os.ftruncate(self._handle, 8 + len(header) + nbytes)

    def write(self, offset: int, data: np.ndarray) -> None:
        """Write bytes (uint8, flat, contiguous)."""
        view, done = memoryview(data.data), 0
        while done < data.size:
            done += os.pwrite(self._handle, view[done:], offset + done)

    def read(self, offset: int, nbytes: int) -> bytes:
        return os.pread(self._handle, nbytes, offset)

    def close(self, *, flush: bool = False) -> None:
        try:
            if flush:
                os.fsync(self._handle)
        finally:
            os.close(self._handle)


def sharded_as(entries: Iterable[TensorEntry], like: Checkpoint) -> list[TensorEntry] | None:
    """The same tensors, each in the file of that name in which `like` stores it; one file is `model.safetensors`.

    None where `like` is no safetensors checkpoint or lacks one of them.
    """
    entries = list(entries)
    if like.format != "safetensors" or any(entry.name not in like.entries for entry in entries):
        return None
    files = {entry.name: Path(like.entries[entry.name].file.name) for entry in entries}
    single = len(set(files.values())) == 1
    return [replace(entry, file=Path(_SINGLE) if single else files[entry.name]) for entry in entries]


def write_tensors(
    folder: Path, entries: Sequence[TensorEntry], tensors: Iterable[tuple[str, np.ndarray]]
) -> list[Path]:
    """Write tensors as they come into the safetensors files that `entries` name, and an index where these are several.

    Args:
        folder: where the files go; see `files.whole_folder`.
        entries: every tensor: dtype, shape, and in `file` the name of its file (only the last part counts).
        tensors: (name, stored bytes as flat uint8) of each entry, in any order, each once.

    Raises:
        OSError: a file cannot be written.
    """
    shards: dict[str, list[TensorEntry]] = {}
    for entry in entries:
        shards.setdefault(entry.file.name, []).append(entry)
    files: dict[str, WeightFile] = {}
    places: dict[str, tuple[str, int, int]] = {}
    try:
        for file, held in shards.items():
            header = new_header(held)
            files[file] = WeightFile(folder / file, header, sum(entry.nbytes for entry in held))
            described: Mapping[str, Any] = json.loads(header)
            for entry in held:
                begin, end = described[entry.name]["data_offsets"]
                places[entry.name] = (file, 8 + len(header) + begin, end - begin)
        for name, data in tensors:
            file, offset, nbytes = places.pop(name)
            assert data.size == nbytes, (name, data.size, nbytes)
            files[file].write(offset, data)
        assert not places, f"tensors never given: {sorted(places)[:3]}"
    finally:
        for opened in files.values():
            opened.close(flush=not places)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
            "weight_map": {entry.name: entry.file.name for entry in sorted(entries, key=lambda e: e.name)},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [folder / file for file in shards]


def carried_files(checkpoint: Checkpoint) -> list[Path]:
    """Config, tokenizer and generation files of a checkpoint's folder: what is not hidden and holds no weights.

    A safetensors index is among them where the checkpoint is safetensors. A bare file has none.
    """
    if checkpoint.folder is None or Path(checkpoint.path).is_file():
        return []
    out = []
    for file in sorted(checkpoint.folder.iterdir()):
        name = file.name
        if not file.is_file() or name.startswith(".") or name.endswith((*_WEIGHT_SUFFIXES, _FOREIGN_INDEX)):
            continue
        if name.endswith(_SAFETENSORS_INDEX) and checkpoint.format != "safetensors":
            continue
        out.append(file)
    return out


def copy_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy `carried_files`, but for an index, which belongs to other weight files."""
    for file in carried_files(checkpoint):
        if not file.name.endswith(_SAFETENSORS_INDEX):
            shutil.copyfile(file, folder / file.name)
