"""torch.distributed.checkpoint folders: `.metadata` and `*.distcp`, as FSDP2, torchtitan and Accelerate write.

torch's own reader unpickles `.metadata` without restriction. Here every class in it is replaced by an inert record,
so nothing of torch is imported to list the tensors and no code of the file can run. Each chunk is a torch.save
stream at an offset of a `.distcp` file (https://docs.pytorch.org/docs/stable/distributed.checkpoint.html).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltalens.checkpoint.base import TensorEntry
from deltalens.checkpoint.formats.pread import Chunk, ChunkedSource
from deltalens.checkpoint.formats.torch_file import TORCH_DTYPES, load_structure, stored_chunk
from deltalens.errors import CheckpointError

__all__ = ["DistributedSource", "open_distributed"]

_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}  # fmt: skip
_MODELS = ("model", "app", "state_dict", "module")


class _Record:
    """An unpickled object of any class: its state, and nothing that acts."""

    def __init__(self, *args: object) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return type(name, (_Record,), {})
        if module == "torch" and f"torch.{name}" in TORCH_DTYPES:
            return f"torch.{name}"
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if name in ("_get_layout", "_MEM_FORMAT_ENCODING") or module.partition(".")[0] == "pathlib":
            return lambda *args: args  # layout, memory format and the path saved to: of no use here
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint's metadata")


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a chunk's torch.save stream lies, and the chunk's place in the tensor."""

    file: Path
    offset: int
    length: int
    shape: tuple[int, ...]
    place: tuple[int, ...]


class DistributedSource(ChunkedSource):
    """A `ChunkedSource` that looks up a chunk's place inside its stream when it is first read."""

    def __init__(self, files: list[Path], entries: Mapping[str, TensorEntry], stored: Mapping[str, list[_Stored]]):
        self._stored = stored
        self._located: set[str] = set()
        placeholders = {
            name: [Chunk(piece.file, 0, piece.shape, piece.place) for piece in pieces]
            for name, pieces in stored.items()
        }
        super().__init__("torch.distributed.checkpoint", files, entries, placeholders)

    def read(
        self, name: str, buffer: np.ndarray | None = None, *, start: int = 0, count: int | None = None
    ) -> np.ndarray:
        if name not in self._located:
            # Two threads may both do this; they write the same value.
            wanted = {chunk.offsets for chunk in self._chunks[name]}
            self._chunks[name] = [_locate(name, piece) for piece in self._stored[name] if piece.place in wanted]
            self._located.add(name)
        return super().read(name, buffer, start=start, count=count)


def open_distributed(folder: Path) -> tuple[DistributedSource, tuple[str, ...]]:
    """Open a checkpoint folder; also notes on what else it holds.

    Optimizer state is left out. Where tensors stand under several keys (`model`, `ema`), `model` is taken.

    Raises:
        CheckpointError: the metadata cannot be read, a file is absent, or no tensor of a model is found.
    """
    metadata = _metadata(folder / ".metadata")
    pieces = _pieces(folder, metadata)
    planner = getattr(metadata, "planner_data", None)
    paths = planner if isinstance(planner, dict) else {}
    groups: dict[tuple[str, ...], dict[str, tuple[str, Any]]] = {}
    for key, meta in metadata.state_dict_metadata.items():
        if type(meta).__name__ != "TensorStorageMetadata":
            continue
        path = tuple(str(part) for part in paths.get(key, (key,)))
        if any(part.lower().startswith(("optim", "lr_scheduler", "scheduler")) for part in (*path[:-1], key)):
            continue
        groups.setdefault(path[:-1], {})[path[-1]] = (key, meta)
    if not groups:
        raise CheckpointError(f"{folder}: its .metadata lists no tensor of a model")
    chosen = min(groups, key=lambda group: (not group or group[-1] not in _MODELS, len(group), group))
    notes = tuple(
        f"{folder}: the {len(names)} tensors under {'.'.join(group) or 'the top'} are not read"
        for group, names in groups.items()
        if group != chosen
    )
    entries, stored = {}, {}
    for name, (key, meta) in groups[chosen].items():
        code = TORCH_DTYPES.get(meta.properties.state[0])
        if code is None:
            raise CheckpointError(f"{folder}: tensor {name!r} has dtype {meta.properties.state[0]}, not known here")
        entries[name] = TensorEntry(name, code, tuple(meta.size), folder / ".metadata")
        stored[name] = pieces.get(key, [])
    files = sorted({piece.file for group in stored.values() for piece in group})
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: there is no such file, though .metadata names it; is the copy complete?")
    return DistributedSource(files, entries, stored), notes


def _metadata(file: Path) -> Any:
    try:
        with file.open("rb") as handle:
            metadata = _Unpickler(handle).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: not the metadata of a distributed checkpoint ({error})") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    if not isinstance(getattr(metadata, "state_dict_metadata", None), dict):
        raise CheckpointError(f"{file}: not the metadata of a distributed checkpoint")
    return metadata


def _pieces(folder: Path, metadata: Any) -> dict[str, list[_Stored]]:
    """Key of a tensor → where each of its chunks is stored."""
    shapes = {
        (key, tuple(chunk.offsets)): tuple(chunk.sizes)
        for key, meta in metadata.state_dict_metadata.items()
        for chunk in getattr(meta, "chunks", ())
    }
    pieces: dict[str, list[_Stored]] = {}
    for index, info in (getattr(metadata, "storage_data", None) or {}).items():
        place = tuple(getattr(index, "offset", None) or ())
        if (index.fqn, place) not in shapes:
            continue
        name = info.relative_path
        if Path(name).name != name:
            raise CheckpointError(f"{folder}/.metadata: names {name!r}, which is not a file of its own folder; refused")
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(f"{folder}: tensor {index.fqn!r} is stored compressed, which deltalens cannot undo")
        piece = _Stored(folder / name, info.offset, info.length, shapes[index.fqn, place], place)
        pieces.setdefault(index.fqn, []).append(piece)
    return pieces


def _locate(name: str, piece: _Stored) -> Chunk:
    with piece.file.open("rb") as handle:
        tensor = load_structure(piece.file, io.BufferedReader(_Window(handle, piece.offset, piece.length)))
    entry, chunk = stored_chunk(name, tensor, piece.file, base=piece.offset)
    if entry.shape != piece.shape:
        raise CheckpointError(
            f"{piece.file}: a chunk of tensor {name!r} has shape {list(entry.shape)}, not the {list(piece.shape)} "
            "that .metadata says"
        )
    return Chunk(piece.file, chunk.at, piece.shape, piece.place, chunk.stride)


class _Window(io.RawIOBase):
    """`length` bytes of a file from `offset` on, as a file."""

    def __init__(self, handle: io.BufferedReader, offset: int, length: int) -> None:
        self._handle, self._offset, self._length, self._at = handle, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._handle.seek(self._offset + self._at)
        data = self._handle.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
