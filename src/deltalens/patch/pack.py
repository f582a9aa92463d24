"""`pack`: two checkpoints in, one patch out, a tensor at a time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from deltalens.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from deltalens.checkpoint.base import DTYPE_BYTES
from deltalens.checkpoint.writer import carried_files, new_header
from deltalens.errors import PatchError
from deltalens.patch.codec import Encoding, encode_new, encode_tensor
from deltalens.patch.format import MAX_FILE, PatchWriter, overall_hash, plain_name, row_length
from deltalens.patch.headers import read_header

__all__ = ["PackResult", "Progress", "pack", "workers"]

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and the name of the tensor just finished."""

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
    encoding: Encoding
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
                result = _write(writer, output, before, after, fast, jobs or workers(), progress)
        except OSError as error:
            raise PatchError(f"{output}: cannot be written ({error.strerror})") from None
        return replace(result, bytes=output.stat().st_size)


def _write(
    writer: PatchWriter,
    output: Path,
    before: Checkpoint,
    after: Checkpoint,
    fast: bool,
    jobs: int,
    progress: Progress | None,
) -> PackResult:
    headers = _weight_headers(after)
    entries = [after.entries[name] for header in headers.values() for name, *_ in read_header(header)]
    identity: dict[str, tuple[str, tuple[int, ...], str]] = {}
    source_identity: dict[str, tuple[str, tuple[int, ...], str]] = {}
    done, total = 0, after.nbytes
    codecs: Counter[str] = Counter()
    for encoded in _encode_all(before, after, entries, fast, jobs):
        entry = encoded.entry
        writer.tensor(encoded.encoding, encoded.source_hash, encoded.result_hash)
        identity[entry.name] = (entry.dtype, entry.shape, encoded.result_hash)
        if encoded.source_hash is not None:
            source_identity[entry.name] = (entry.dtype, entry.shape, encoded.source_hash)
        codecs[encoded.encoding.codec] += 1
        done += entry.nbytes
        if progress is not None:
            progress(done, total, entry.name)
    for name, entry in before.entries.items():  # removed and reshaped ones too: the hash is of the whole source
        if name not in source_identity:
            source_identity[name] = (entry.dtype, entry.shape, blake3(before.read(name).data).hexdigest())
    _carry_files(writer, before, after)
    source_hash = overall_hash(source_identity)
    removed = [name for name in before.entries if name not in after.entries]
    about = {
        "settings": {"fast": fast},
        "source": {"hash": source_hash, "path": Path(before.path).name},
        "result": {"path": Path(after.path).name},
        "removed": removed,
    }
    writer.finish(headers, about)
    return PackResult(
        path=output,
        bytes=0,
        result_bytes=after.nbytes,
        tensors=len(after.entries),
        codecs=dict(codecs),
        added=sum(name not in before.entries for name in after.entries),
        removed=len(removed),
        source_hash=source_hash,
        result_hash=overall_hash(identity),
    )


def _encode_all(
    before: Checkpoint, after: Checkpoint, entries: Sequence[TensorEntry], fast: bool, jobs: int
) -> Iterator[_Encoded]:
    """Encoded tensors in order. Frames that wait for a large tensor before them are held: of a bounded size."""
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
        return _Encoded(entry, encode_new(trained, fast=fast), None, result_hash)
    source = before.read(entry.name)
    source_hash = blake3(source.data).hexdigest()
    width, columns = DTYPE_BYTES[entry.dtype], row_length(entry.shape)
    encoding = encode_tensor(source, trained, entry.dtype, width, columns=columns, fast=fast)
    return _Encoded(entry, encoding, source_hash, result_hash)


def _weight_headers(after: Checkpoint) -> dict[str, bytes]:
    """The header of each weight file of the result: TRAINED's own, so that applying gives the same file, byte for byte.

    Where TRAINED is of another format, the result is one safetensors file.
    """
    if after.format == "safetensors":
        return {file.name: _header_bytes(file, after) for file in after.files}
    return {"model.safetensors": new_header(list(after.entries.values()))}


def _header_bytes(file: Path, after: Checkpoint) -> bytes:
    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
    held = sum(entry.nbytes for entry in after.entries.values() if entry.file == file)
    if 8 + len(header) + held != file.stat().st_size:
        raise PatchError(f"{file}: has bytes that belong to no tensor; save it again with safetensors")
    return header


def _carry_files(writer: PatchWriter, before: Checkpoint, after: Checkpoint) -> None:
    """Config, tokenizer and generation files of TRAINED's folder; those that SOURCE has alike are only named."""
    for file in carried_files(after):
        if not plain_name(file.name) or file.stat().st_size > MAX_FILE:
            continue
        data = file.read_bytes()
        twin = before.folder / file.name if before.folder is not None else None
        writer.file(file.name, data, in_source=twin is not None and twin.is_file() and twin.read_bytes() == data)
