"""The patch file: magic, frames, a footer that says what they are, and its length and hash.

    magic "DLPATCH1" | frames … | footer (zstd of JSON) | footer length (u64 LE) | BLAKE3 of the footer | "DLPATEND"

The footer holds everything but the frames' bytes, so that a patch is written in one streaming pass and any tensor can
be read alone. Every byte is covered: frames by the hashes in the footer, the footer by the hash behind it, the rest by
being constant or by where it points. docs/patch.md describes the fields.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import zstandard
from blake3 import blake3

from deltalens._version import __version__
from deltalens.checkpoint.base import DTYPE_BYTES
from deltalens.errors import PatchError
from deltalens.files import whole_file
from deltalens.patch.codec import CODECS, MOST_PACKED

__all__ = ["CarriedFile", "PatchFile", "PatchTensor", "PatchWriter", "overall_hash", "plain_name"]

MAGIC, END = b"DLPATCH1", b"DLPATEND"
TAIL = 8 + 32 + len(END)
SCHEMA = 1
MAX_FOOTER = 1 << 30
MAX_ELEMENTS = 1 << 40
MAX_FILE = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchTensor:
    """One tensor of the result. `source_hash` is None where it does not come from the source's tensor of that name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    offset: int
    length: int
    frame_hash: str
    source_hash: str | None
    result_hash: str

    @property
    def width(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return prod(self.shape) * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class CarriedFile:
    """A file of the result: its bytes in a frame (zstd), or, where `length` is 0, the source's file of that name.

    `weights` marks the header (JSON) of a safetensors file of that name, whose data are the tensors.
    """

    path: str
    hash: str
    bytes: int
    offset: int
    length: int
    frame_hash: str | None
    weights: bool = False


def overall_hash(tensors: Mapping[str, tuple[str, tuple[int, ...], str]]) -> str:
    """One hash of a whole checkpoint: BLAKE3 over name, dtype, shape and content hash, in the order of the names."""
    digest = blake3()
    for name in sorted(tensors):
        dtype, shape, content = tensors[name]
        digest.update(json.dumps([name, dtype, list(shape), content]).encode())
    return digest.hexdigest()


def plain_name(name: Any) -> bool:
    """Whether a name from a patch is a plain file name, which cannot leave the folder it is written to."""
    return (
        isinstance(name, str)
        and 0 < len(name) < 256
        and name not in (".", "..")
        and not any(character in name for character in "/\\:")
        and name == name.strip()
        and name.isprintable()  # no control characters, nothing that has no UTF-8
    )


class PatchWriter:
    """Writes frames as they come; the file appears under its name when `finish` was called and the block ends."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._at = stream.write(MAGIC)

    @classmethod
    @contextmanager
    def create(cls, path: Path) -> Iterator[PatchWriter]:
        with whole_file(path) as temporary, temporary.open("wb") as stream:
            yield cls(stream)

    def add(self, frame: bytes) -> tuple[int, int]:
        """Write a frame; returns its offset and length."""
        offset = self._at
        self._at += self._stream.write(frame)
        return offset, len(frame)

    def finish(self, footer: dict[str, Any]) -> None:
        """Write the footer and the tail."""
        packed = zstandard.ZstdCompressor(level=19).compress(json.dumps(footer, separators=(",", ":")).encode())
        self._stream.write(packed + len(packed).to_bytes(8, "little") + blake3(packed).digest() + END)


class PatchFile:
    """An opened patch: its footer checked, its frames read and checked one at a time.

    Raises:
        PatchError: not a patch, of a later schema, cut short or damaged; the message names the file and the place.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise PatchError(f"{path}: cannot be opened ({error.strerror})") from None
        try:
            footer = self._read_footer()
            self._parse(footer)
        except PatchError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise PatchError(f"{path}: cannot be read ({error.strerror})") from None
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            self.close()
            raise PatchError(f"{path}: its footer is malformed") from None

    def __enter__(self) -> PatchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._handle)

    def _read_footer(self) -> dict[str, Any]:
        size = os.fstat(self._handle).st_size
        self.bytes = size
        if size < len(MAGIC) + TAIL or os.pread(self._handle, len(MAGIC), 0) != MAGIC:
            raise PatchError(f"{self.path}: not a deltalens patch, or cut short")
        tail = os.pread(self._handle, TAIL, size - TAIL)
        length, digest = int.from_bytes(tail[:8], "little"), tail[8:40]
        if tail[40:] != END:
            raise PatchError(f"{self.path}: its end is missing; it was cut short or damaged")
        self._frames_end = size - TAIL - length
        if length > MAX_FOOTER or self._frames_end < len(MAGIC):
            raise PatchError(f"{self.path}: the length of its footer is damaged")
        packed = os.pread(self._handle, length, self._frames_end)
        if blake3(packed).digest() != digest:
            raise PatchError(f"{self.path}: its footer is damaged")
        try:
            size = zstandard.frame_content_size(packed)
            if not 0 < size <= min(MAX_FOOTER, length * MOST_PACKED):
                raise PatchError(f"{self.path}: its footer is too large")
            footer = json.loads(zstandard.ZstdDecompressor().decompress(packed, max_output_size=size))
        except zstandard.ZstdError:
            raise PatchError(f"{self.path}: its footer is damaged") from None
        if footer["schema"] != SCHEMA:
            raise PatchError(
                f"{self.path}: schema {footer['schema']}, but deltalens {__version__} reads schema {SCHEMA}; update it"
            )
        return footer

    def _parse(self, footer: dict[str, Any]) -> None:
        self.source_hash: str = footer["source"]["hash"]
        self.result_hash: str = footer["result"]["hash"]
        self.settings: dict[str, Any] = footer["settings"]
        self.removed = [str(name) for name in footer["removed"]]
        self.tensors: dict[str, PatchTensor] = {}
        for name, dtype, shape, codec, offset, length, frame, source, result in footer["tensors"]:
            if not isinstance(name, str) or name in self.tensors:
                raise PatchError(f"{self.path}: names a tensor twice, or not by a text: {name!r}")
            if codec not in CODECS or dtype not in DTYPE_BYTES:
                raise PatchError(f"{self.path}: tensor {name!r} is of a kind that this deltalens does not know")
            self._check_range(offset, length, f"tensor {name!r}")
            if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
                raise PatchError(f"{self.path}: tensor {name!r} has an impossible shape")
            if prod(shape) > (min(MAX_ELEMENTS, length * MOST_PACKED) if source is None else MAX_ELEMENTS):
                raise PatchError(f"{self.path}: tensor {name!r} has an impossible shape")
            if source is None and codec != "raw":
                raise PatchError(f"{self.path}: tensor {name!r} has codec {codec} without a source")
            if (codec == "unchanged") != (length == 0) or (codec == "unchanged" and result not in (None, source)):
                raise PatchError(f"{self.path}: tensor {name!r} is said to be unchanged, and to be changed")
            self.tensors[name] = PatchTensor(
                name=name,
                dtype=dtype,
                shape=tuple(shape),
                codec=codec,
                offset=offset,
                length=length,
                frame_hash=frame,
                source_hash=source,
                result_hash=source if result is None else result,
            )
        self.files = [CarriedFile(**entry) for entry in footer["files"]]
        for file in self.files:
            if not plain_name(file.path):
                raise PatchError(f"{self.path}: carries a file named {file.path!r}, which is no plain name; refused")
            self._check_range(file.offset, file.length, f"file {file.path!r}")
            most = min(MAX_FILE, file.length * MOST_PACKED) if file.length else MAX_FILE
            if type(file.bytes) is not int or not 0 <= file.bytes <= most:
                raise PatchError(f"{self.path}: the file {file.path!r} is impossibly large")
        if len({file.path for file in self.files}) != len(self.files):
            raise PatchError(f"{self.path}: carries a file twice")
        self._check_overall()

    def _check_range(self, offset: int, length: int, what: str) -> None:
        numbers = type(offset) is int and type(length) is int
        inside = numbers and len(MAGIC) <= offset and length >= 0 and offset + length <= self._frames_end
        if not inside and (offset, length) != (0, 0):
            raise PatchError(f"{self.path}: the frame of {what} lies outside the file")

    def _check_overall(self) -> None:
        result = {t.name: (t.dtype, t.shape, t.result_hash) for t in self.tensors.values()}
        if overall_hash(result) != self.result_hash:
            raise PatchError(f"{self.path}: its footer contradicts its result hash")

    def frame(self, entry: PatchTensor) -> bytes:
        """A tensor's frame, checked against its hash."""
        return self._frame(entry.offset, entry.length, entry.frame_hash, f"tensor {entry.name!r}")

    def _frame(self, offset: int, length: int, digest: str, what: str) -> bytes:
        data = os.pread(self._handle, length, offset)
        while len(data) < length and (more := os.pread(self._handle, length - len(data), offset + len(data))):
            data += more
        if blake3(data).hexdigest() != digest:
            raise PatchError(f"{self.path}: the frame of {what} is damaged; get the patch again")
        return data

    def file_bytes(self, file: CarriedFile) -> bytes:
        """The bytes of a carried file (not for one that comes from the source)."""
        packed = self._frame(file.offset, file.length, str(file.frame_hash), f"file {file.path!r}")
        try:
            if zstandard.frame_content_size(packed) != file.bytes:
                raise PatchError(f"{self.path}: the file {file.path!r} is damaged; get the patch again")
            data = zstandard.ZstdDecompressor().decompress(packed, max_output_size=file.bytes)
        except zstandard.ZstdError:
            raise PatchError(f"{self.path}: the file {file.path!r} is damaged; get the patch again") from None
        if blake3(data).hexdigest() != file.hash:
            raise PatchError(f"{self.path}: the file {file.path!r} is damaged; get the patch again")
        return data
