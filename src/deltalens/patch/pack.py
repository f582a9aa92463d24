"""`pack`: two checkpoints in, one patch out, a tensor at a time."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3

from deltalens._version import __version__
from deltalens.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from deltalens.checkpoint.base import DTYPE_BYTES
from deltalens.errors import PatchError
from deltalens.patch.codec import encode_tensor
from deltalens.patch.format import MAX_FILE, SCHEMA, PatchWriter, overall_hash, plain_name

__all__ = ["PackResult", "Progress", "pack", "workers"]

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and the name of the tensor just finished."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp")
FOREIGN_INDEX = ".bin.index.json"
AHEAD_BYTES = 64 << 20  # tensors encoded ahead of the one that is to be written next


@dataclass(frozen=True, slots=True, kw_only=True)
class PackResult:
    """What `pack` wrote: sizes in bytes, tensors by codec, and how many tensors are new or gone."""

    path: Path
    bytes: int
    result_bytes: int
    tensors: int
    codecs: dict[str, int]
    added: int
    removed: int
    source_hash: str
    result_hash: str


@dataclass(frozen=True, slots=True)
class _Encoded:
    entry: TensorEntry
    codec: str
    frame: bytes
    source_hash: str | None
    result_hash: str


def workers() -> int:
    """Threads to use: one a processor, at most four, since each holds a tensor."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(4, available)


def pack(
    source: str | Path,
    trained: str | Path,
    output: str | Path,
    *,
    fast: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> PackResult:
    """Write a patch that turns `source` into `trained`, bit for bit.

    Args:
        source, trained: directories, files or Hub ids.
        output: the patch file; appears when it is whole.
        fast: skip the trials for small and very sparse tensors.
        jobs: threads; one a processor by default.
        progress: called after each tensor.

    Raises:
        CheckpointError: a checkpoint cannot be read.
        PatchError: the patch cannot be written.
    """
    output = Path(output)
    with open_checkpoint(source, stored=True) as before, open_checkpoint(trained, base=before, stored=True) as after:
        try:
            with PatchWriter.create(output) as writer:
                footer, codecs = _write(writer, before, after, fast, jobs or workers(), progress)
                writer.finish(footer)
        except OSError as error:
            raise PatchError(f"{output}: cannot be written ({error.strerror})") from None
        added = sum(name not in before.entries for name in after.entries)
        return PackResult(
            path=output,
            bytes=output.stat().st_size,
            result_bytes=after.nbytes,
            tensors=len(after.entries),
            codecs=dict(codecs),
            added=added,
            removed=len(footer["removed"]),
            source_hash=footer["source"]["hash"],
            result_hash=footer["result"]["hash"],
        )


def _write(
    writer: PatchWriter, before: Checkpoint, after: Checkpoint, fast: bool, jobs: int, progress: Progress | None
) -> tuple[dict[str, Any], Counter[str]]:
    tensors, identity = [], {}
    source_identity: dict[str, tuple[str, tuple[int, ...], str]] = {}
    done, total = 0, after.nbytes
    codecs: Counter[str] = Counter()
    for encoded in _encode_all(before, after, fast, jobs):
        entry = encoded.entry
        offset, length = writer.add(encoded.frame) if encoded.frame else (0, 0)
        frame_hash = blake3(encoded.frame).hexdigest() if encoded.frame else ""
        result = None if encoded.result_hash == encoded.source_hash else encoded.result_hash
        shape = list(entry.shape)
        fields = [entry.name, entry.dtype, shape, encoded.codec, offset, length, frame_hash]
        tensors.append([*fields, encoded.source_hash, result])
        identity[entry.name] = (entry.dtype, entry.shape, encoded.result_hash)
        if encoded.source_hash is not None:
            source_identity[entry.name] = (entry.dtype, entry.shape, encoded.source_hash)
        codecs[encoded.codec] += 1
        done += entry.nbytes
        if progress is not None:
            progress(done, total, entry.name)
    for name, entry in before.entries.items():  # removed and reshaped ones too: the hash is of the whole source
        if name not in source_identity:
            source_identity[name] = (entry.dtype, entry.shape, blake3(before.read(name).data).hexdigest())
    footer = {
        "schema": SCHEMA,
        "deltalens": __version__,
        "settings": {"fast": fast},
        "source": {"hash": overall_hash(source_identity), "path": Path(before.path).name},
        "result": {"hash": overall_hash(identity), "path": Path(after.path).name},
        "tensors": tensors,
        "removed": [name for name in before.entries if name not in after.entries],
        "files": [*_weight_headers(writer, after), *_other_files(writer, before, after)],
    }
    return footer, codecs


def _encode_all(before: Checkpoint, after: Checkpoint, fast: bool, jobs: int) -> Iterator[_Encoded]:
    """Encoded tensors in order. Frames that wait for a large tensor before them are held: of a bounded size."""
    entries = list(after.entries.values())
    budget = max((entry.nbytes for entry in entries), default=0) + AHEAD_BYTES
    with ThreadPoolExecutor(jobs) as pool:
        ahead: list[Future[_Encoded]] = []
        held = 0
        first = 0
        try:
            for entry in entries:
                while ahead and held + entry.nbytes > budget:
                    yield ahead.pop(0).result()
                    held -= entries[first].nbytes
                    first += 1
                ahead.append(pool.submit(_encode, before, after, entry, fast))
                held += entry.nbytes
            while ahead:
                yield ahead.pop(0).result()
        except BaseException:
            for future in ahead:
                future.cancel()
            raise


def _encode(before: Checkpoint, after: Checkpoint, entry: TensorEntry, fast: bool) -> _Encoded:
    trained = after.read(entry.name)
    result_hash = blake3(trained.data).hexdigest()
    base = before.entries.get(entry.name)
    if base is None or (base.dtype, base.shape) != (entry.dtype, entry.shape):
        frame = zstandard.ZstdCompressor(level=1 if fast else 9).compress(trained.data)
        return _Encoded(entry, "raw", frame, None, result_hash)
    source = before.read(entry.name)
    source_hash = blake3(source.data).hexdigest()
    codec, frame = encode_tensor(source, trained, entry.dtype, DTYPE_BYTES[entry.dtype], fast=fast)
    return _Encoded(entry, codec, frame, source_hash, result_hash)


def _carry(writer: PatchWriter, path: str, data: bytes, *, weights: bool = False) -> dict[str, Any]:
    packed = zstandard.ZstdCompressor(level=19).compress(data)
    offset, length = writer.add(packed)
    return {
        "path": path,
        "hash": blake3(data).hexdigest(),
        "bytes": len(data),
        "offset": offset,
        "length": length,
        "frame_hash": blake3(packed).hexdigest(),
        "weights": weights,
    }


def _weight_headers(writer: PatchWriter, after: Checkpoint) -> list[dict[str, Any]]:
    """The header of each weight file of the result: TRAINED's own, so that applying gives the same file, byte for byte.

    Where TRAINED is of another format, the result is one safetensors file.
    """
    if after.format == "safetensors":
        return [_carry(writer, file.name, _header_bytes(file, after), weights=True) for file in after.files]
    return [_carry(writer, "model.safetensors", _new_header(list(after.entries.values())), weights=True)]


def _header_bytes(file: Path, after: Checkpoint) -> bytes:
    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
    held = sum(entry.nbytes for entry in after.entries.values() if entry.file == file)
    if 8 + len(header) + held != file.stat().st_size:
        raise PatchError(f"{file}: has bytes that belong to no tensor; save it again with safetensors")
    return header


def _new_header(entries: Sequence[TensorEntry]) -> bytes:
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


def _other_files(writer: PatchWriter, before: Checkpoint, after: Checkpoint) -> list[dict[str, Any]]:
    """Config, tokenizer and generation files of TRAINED's folder; those that SOURCE has alike are only named."""
    if after.folder is None or Path(after.path).is_file():
        return []
    out = []
    for file in sorted(after.folder.iterdir()):
        name = file.name
        if not file.is_file() or name.startswith(".") or name.endswith((*WEIGHT_SUFFIXES, FOREIGN_INDEX)):
            continue
        if name.endswith(".safetensors.index.json") and after.format != "safetensors":
            continue
        if not plain_name(name) or file.stat().st_size > MAX_FILE:
            continue
        data = file.read_bytes()
        twin = before.folder / name if before.folder is not None else None
        if twin is not None and twin.is_file() and twin.read_bytes() == data:
            digest = blake3(data).hexdigest()
            out.append({"path": name, "hash": digest, "bytes": len(data), "offset": 0, "length": 0, "frame_hash": None})
        else:
            out.append(_carry(writer, name, data))
    return out
