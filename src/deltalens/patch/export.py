"""The same change for consumers that take absolute values at flat positions, as one safetensors file.

vLLM's sparse updates (its pull requests 40096, 50723 and 53751) take, for each tensor, the checkpoint's name, the full
shape, int32 positions in the flattened tensor, and the values there. `vllm` writes `NAME.indices` and `NAME.values`;
`safetensors` writes the same pairs as `NAME/indices` and `NAME/values` with int64 positions. Shapes and dtypes are in
the metadata. A tensor that is new or reshaped is written whole, under its own name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deltalens.checkpoint import Checkpoint, open_checkpoint
from deltalens.checkpoint.base import DTYPE_BYTES
from deltalens.errors import PatchError
from deltalens.files import whole_file

__all__ = ["ExportFormat", "export_sparse", "read_sparse"]

ExportFormat = Literal["vllm", "safetensors"]
INT32_LIMIT = 1 << 31
_SEPARATOR = {"vllm": ".", "safetensors": "/"}


def export_sparse(source: str | Path, trained: str | Path, output: str | Path, layout: ExportFormat) -> int:
    """Write the changed words of every tensor, positions ascending; returns the number of changed words.

    Two passes over the tensors: one counts, for the header; one writes. Memory holds one tensor.

    Raises:
        PatchError: a tensor has too many elements for int32 positions, two tensors would have one name in the file,
            or the file cannot be written.
    """
    output = Path(output)
    with open_checkpoint(source, stored=True) as before, open_checkpoint(trained, base=before, stored=True) as after:
        header, changed = _header(before, after, layout)
        try:
            with whole_file(output) as temporary, temporary.open("wb") as stream:
                data = json.dumps(header, separators=(",", ":")).encode()
                data += b" " * (-len(data) % 8)
                stream.write(len(data).to_bytes(8, "little") + data)
                for part in _parts(before, after, layout):
                    stream.write(part.tobytes())
        except OSError as error:
            raise PatchError(f"{output}: cannot be written ({error.strerror})") from None
    return changed


def read_sparse(path: str | Path) -> Iterator[dict[str, Any]]:
    """What `export_sparse` wrote, a tensor at a time: `name`, `dtype`, `shape`, `indices`, `values` (stored bytes).

    `indices` is None for a tensor that was written whole.
    """
    with open_checkpoint(path, stored=True) as file:
        stream = Path(path).open("rb")  # noqa: SIM115 - closed below, with the header read
        with stream:
            metadata = json.loads(stream.read(int.from_bytes(stream.read(8), "little"))).get("__metadata__", {})
        if metadata.get("layout") not in _SEPARATOR or "tensors" not in metadata:
            raise PatchError(f"{path}: was not written by export_sparse (deltalens pack --format)")
        separator = _SEPARATOR[metadata["layout"]]
        for name, (dtype, shape, whole) in json.loads(metadata["tensors"]).items():
            if whole:
                yield {"name": name, "dtype": dtype, "shape": shape, "indices": None, "values": file.read(name)}
                continue
            key = f"{name}{separator}indices"
            width = np.int32 if file.entries[key].dtype == "I32" else np.int64
            yield {
                "name": name,
                "dtype": dtype,
                "shape": shape,
                "indices": file.read(key).view(width),
                "values": file.read(f"{name}{separator}values"),
            }


def _changes(before: Checkpoint, after: Checkpoint) -> Iterator[tuple[str, np.ndarray | None, np.ndarray]]:
    """(name, changed positions or None for a whole tensor, words) of each tensor that differs."""
    for name, entry in after.entries.items():
        words = after.read(name).view(np.dtype(f"<u{DTYPE_BYTES[entry.dtype]}"))
        base = before.entries.get(name)
        if base is None or (base.dtype, base.shape) != (entry.dtype, entry.shape):
            yield name, None, words
            continue
        places = np.flatnonzero(before.read(name).view(words.dtype) != words)
        if places.size:
            yield name, places, words


def _header(before: Checkpoint, after: Checkpoint, layout: ExportFormat) -> tuple[dict[str, Any], int]:
    described: dict[str, Any] = {}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "layout": layout}}
    at = changed = 0

    def add(key: str, dtype: str, shape: list[int]) -> None:
        nonlocal at
        if key in header:
            raise PatchError(f"{after.path}: two of its tensors would be written as {key!r} in the layout {layout}")
        nbytes = int(np.prod(shape, dtype=np.int64)) * DTYPE_BYTES[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes

    for name, places, words in _changes(before, after):
        entry = after.entries[name]
        described[name] = [entry.dtype, list(entry.shape), places is None]
        if places is None:
            add(name, entry.dtype, list(entry.shape))
            continue
        if layout == "vllm" and words.size >= INT32_LIMIT:
            raise PatchError(f"{after.path}: tensor {name!r} has too many elements for vLLM's int32 positions")
        changed += places.size
        add(f"{name}{_SEPARATOR[layout]}indices", "I32" if layout == "vllm" else "I64", [places.size])
        add(f"{name}{_SEPARATOR[layout]}values", entry.dtype, [places.size])
    header["__metadata__"]["tensors"] = json.dumps(described)
    return header, changed


def _parts(before: Checkpoint, after: Checkpoint, layout: ExportFormat) -> Iterator[np.ndarray]:
    for _, places, words in _changes(before, after):
        if places is None:
            yield words
        else:
            yield places.astype(np.int32 if layout == "vllm" else np.int64)
            yield words[places]
