"""The patch file: magic, frames, a footer that says what they are, and its length and hash.

    magic "DLPATCH2" | frames … | footer | footer length (u64 LE) | BLAKE3 of the footer | "DLPATEND"
    footer: lengths of its first two parts (u32 LE) | zstd of JSON | zstd of all models | CRC-32s and hashes

The footer holds everything but the frames' bytes, so that a patch is written in one streaming pass and any tensor can
be read alone. Every byte is covered: frames by their CRC-32 (and what they decode to by a hash), the footer by the
hash behind it, the rest by being constant or by where it points. docs/patch.md describes the fields.
"""

from __future__ import annotations

import json
import os
import zlib
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
from deltalens.patch.codec import CODECS, MOST_PACKED, Encoding
from deltalens.patch.headers import fill_offsets, read_header, strip_offsets

__all__ = ["CarriedFile", "PatchFile", "PatchTensor", "PatchWriter", "overall_hash", "plain_name"]

SCHEMA = 2
MAGIC, END = b"DLPATCH2", b"DLPATEND"
HASH, CRC = 32, 4  # bytes
TAIL = 8 + HASH + len(END)
MAX_FOOTER = 1 << 30
MAX_ELEMENTS = 1 << 40
MAX_FILE = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchTensor:
    """One tensor of the result. `source_hash` is None where it does not come from the source's tensor of that name.

    `file` and `place` (bytes): where the result stores it. `model`: the part of its encoding that the footer holds.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    place: int
    codec: str
    offset: int
    length: int
    crc: int
    model: bytes
    source_hash: str | None
    result_hash: str

    @property
    def width(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def columns(self) -> int:
        return row_length(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return prod(self.shape) * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class CarriedFile:
    """A file of the result: its bytes in a frame (zstd), or, where `length` is 0, the source's file of that name."""

    path: str
    hash: str
    bytes: int
    offset: int
    length: int
    crc: int


def row_length(shape: tuple[int, ...]) -> int:
    """Words in a row; a vector is one row."""
    return shape[-1] if len(shape) > 1 else prod(shape)


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
        self._stream.write(MAGIC)
        self._codecs: list[str] = []
        self._lengths: list[int] = []
        self._models: list[bytes] = []
        self._checks = bytearray()
        self._files: list[dict[str, Any]] = []

    @classmethod
    @contextmanager
    def create(cls, path: Path) -> Iterator[PatchWriter]:
        with whole_file(path) as temporary, temporary.open("wb") as stream:
            yield cls(stream)

    def tensor(self, encoding: Encoding, source_hash: str | None, result_hash: str) -> None:
        """Write the next tensor, in the order of the headers that `finish` is given."""
        self._stream.write(encoding.frame)
        self._codecs.append(encoding.codec)
        self._lengths.append(len(encoding.frame))
        self._models.append(encoding.model)
        if encoding.codec != "unchanged":
            self._checks += zlib.crc32(encoding.frame).to_bytes(CRC, "little") + bytes.fromhex(result_hash)
        if source_hash is not None:
            self._checks += bytes.fromhex(source_hash)

    def file(self, path: str, data: bytes, *, in_source: bool) -> None:
        """Carry a file, after all tensors; only its name and hash where the source has it alike."""
        packed = b"" if in_source else zstandard.ZstdCompressor(level=19).compress(data)
        self._stream.write(packed)
        digest = blake3(data).hexdigest()
        size = {"bytes": len(data), "length": len(packed), "crc": zlib.crc32(packed)}
        self._files.append({"path": path, "hash": digest, **size})

    def finish(self, headers: Mapping[str, bytes], about: dict[str, Any]) -> None:
        """Write the footer and the tail. `headers`: the result's weight files; `about`: the footer's other fields."""
        footer = {
            "schema": SCHEMA,
            "deltalens": __version__,
            **about,
            "weights": [{"path": path, "header": strip_offsets(header)} for path, header in headers.items()],
            "codecs": self._codecs,
            "lengths": self._lengths,
            "models": [len(model) for model in self._models],
            "files": self._files,
        }
        pack = zstandard.ZstdCompressor(level=19).compress
        parts = [pack(json.dumps(footer, separators=(",", ":")).encode()), pack(b"".join(self._models))]
        whole = b"".join([*(len(part).to_bytes(4, "little") for part in parts), *parts, self._checks])
        self._stream.write(whole + len(whole).to_bytes(8, "little") + blake3(whole).digest() + END)


class PatchFile:
    """An opened patch: its footer checked, its frames read and checked one at a time.

    Raises:
        PatchError: not a patch, of another schema, cut short or damaged; the message names the file and the place.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise PatchError(f"{path}: cannot be opened ({error.strerror})") from None
        try:
            self._parse(*self._read_footer())
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

    def _read_footer(self) -> tuple[dict[str, Any], bytes, bytes]:
        """The footer's parts: JSON, models, CRC-32s and hashes."""
        size = os.fstat(self._handle).st_size
        self.bytes = size
        magic = os.pread(self._handle, len(MAGIC), 0)
        if magic[:-1] == MAGIC[:-1] and magic[-1:].isdigit() and magic != MAGIC:
            raise self._other_schema(magic[-1:].decode())
        if size < len(MAGIC) + TAIL or magic != MAGIC:
            raise PatchError(f"{self.path}: not a deltalens patch, or cut short")
        tail = os.pread(self._handle, TAIL, size - TAIL)
        length, digest = int.from_bytes(tail[:8], "little"), tail[8 : 8 + HASH]
        if tail[8 + HASH :] != END:
            raise PatchError(f"{self.path}: its end is missing; it was cut short or damaged")
        self._frames_end = size - TAIL - length
        if length > MAX_FOOTER or self._frames_end < len(MAGIC):
            raise PatchError(f"{self.path}: the length of its footer is damaged")
        whole = os.pread(self._handle, length, self._frames_end)
        if blake3(whole).digest() != digest:
            raise PatchError(f"{self.path}: its footer is damaged")
        first, second = (int.from_bytes(whole[i : i + 4], "little") for i in (0, 4))
        if 8 + first + second > length:
            raise PatchError(f"{self.path}: its footer is damaged")
        footer = json.loads(self._unpack(whole[8 : 8 + first]))
        if footer["schema"] != SCHEMA:
            raise self._other_schema(footer["schema"])
        return footer, self._unpack(whole[8 + first : 8 + first + second]), whole[8 + first + second :]

    def _other_schema(self, schema: Any) -> PatchError:
        return PatchError(
            f"{self.path}: schema {schema}, but deltalens {__version__} reads schema {SCHEMA}; "
            "pack it again, or apply it with the version that wrote it"
        )

    def _unpack(self, packed: bytes) -> bytes:
        try:
            size = zstandard.frame_content_size(packed)
            if not 0 <= size <= min(MAX_FOOTER, len(packed) * MOST_PACKED):
                raise PatchError(f"{self.path}: its footer is too large")
            return zstandard.ZstdDecompressor().decompress(packed, max_output_size=size)
        except zstandard.ZstdError:
            raise PatchError(f"{self.path}: its footer is damaged") from None

    def _parse(self, footer: dict[str, Any], models: bytes, checks: bytes) -> None:
        self.source_hash: str = footer["source"]["hash"]
        self.settings: dict[str, Any] = footer["settings"]
        self.removed = [str(name) for name in footer["removed"]]
        self.weights: dict[str, bytes] = {}
        described = []
        for entry in footer["weights"]:
            path = self._plain(entry["path"])
            try:
                self.weights[path] = fill_offsets(entry["header"])
                described += [(path, *tensor) for tensor in read_header(self.weights[path])]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise PatchError(f"{self.path}: the header of {path} is malformed") from None
        self.tensors: dict[str, PatchTensor] = {}
        take, take_model = _Cut(checks), _Cut(models)
        self._at = len(MAGIC)
        rows = zip(described, footer["codecs"], footer["lengths"], footer["models"], strict=True)
        for (path, name, dtype, shape, place), codec, length, model in rows:
            if name in self.tensors:
                raise PatchError(f"{self.path}: names tensor {name!r} twice")
            if codec not in CODECS:
                raise PatchError(f"{self.path}: tensor {name!r} is of a kind that this deltalens does not know")
            offset = self._next(length, f"tensor {name!r}")
            if prod(shape) > (min(MAX_ELEMENTS, length * MOST_PACKED) if codec == "new" else MAX_ELEMENTS):
                raise PatchError(f"{self.path}: tensor {name!r} has an impossible shape")
            same = codec == "unchanged"
            if same != (length == 0) or (codec == "conditioned") != (model != 0):
                raise PatchError(f"{self.path}: tensor {name!r} does not have what its codec asks for")
            crc = 0 if same else int.from_bytes(take(CRC), "little")
            result = None if same else take(HASH).hex()
            source = None if codec == "new" else take(HASH).hex()
            self.tensors[name] = PatchTensor(
                name=name,
                dtype=dtype,
                shape=shape,
                file=path,
                place=place,
                codec=codec,
                offset=offset,
                length=length,
                crc=crc,
                model=take_model(model),
                source_hash=source,
                result_hash=str(result or source),
            )
        self.files: list[CarriedFile] = []
        for entry in footer["files"]:
            what = f"file {self._plain(entry['path'])!r}"
            file = CarriedFile(**entry, offset=self._next(entry["length"], what))
            most = min(MAX_FILE, file.length * MOST_PACKED) if file.length else MAX_FILE
            if type(file.bytes) is not int or not 0 <= file.bytes <= most:
                raise PatchError(f"{self.path}: {what} is impossibly large")
            self.files.append(file)
        if len({*self.weights, *(file.path for file in self.files)}) != len(footer["weights"]) + len(self.files):
            raise PatchError(f"{self.path}: carries a file twice")
        if self._at != self._frames_end or take.rest or take_model.rest:
            raise PatchError(f"{self.path}: its footer does not account for every byte")
        self.result_hash = overall_hash({t.name: (t.dtype, t.shape, t.result_hash) for t in self.tensors.values()})

    def _plain(self, name: Any) -> str:
        if not plain_name(name):
            raise PatchError(f"{self.path}: carries a file named {name!r}, which is no plain name; refused")
        return str(name)

    def _next(self, length: Any, what: str) -> int:
        """Offset of the next frame: they follow each other."""
        offset = self._at
        if type(length) is not int or not 0 <= length <= self._frames_end - offset:
            raise PatchError(f"{self.path}: the frame of {what} lies outside the file")
        self._at += length
        return offset

    def frame(self, entry: PatchTensor) -> bytes:
        """A tensor's frame, checked against its CRC-32."""
        return self._frame(entry, f"tensor {entry.name!r}")

    def _frame(self, entry: PatchTensor | CarriedFile, what: str) -> bytes:
        data = os.pread(self._handle, entry.length, entry.offset)
        while len(data) < entry.length and (
            more := os.pread(self._handle, entry.length - len(data), entry.offset + len(data))
        ):
            data += more
        if zlib.crc32(data) != entry.crc:
            raise PatchError(f"{self.path}: the frame of {what} is damaged; get the patch again")
        return data

    def file_bytes(self, file: CarriedFile) -> bytes:
        """The bytes of a carried file (not for one that comes from the source)."""
        packed = self._frame(file, f"file {file.path!r}")
        try:
            if zstandard.frame_content_size(packed) != file.bytes:
                raise PatchError(f"{self.path}: the file {file.path!r} is damaged; get the patch again")
            data = zstandard.ZstdDecompressor().decompress(packed, max_output_size=file.bytes)
        except zstandard.ZstdError:
            raise PatchError(f"{self.path}: the file {file.path!r} is damaged; get the patch again") from None
        if blake3(data).hexdigest() != file.hash:
            raise PatchError(f"{self.path}: the file {file.path!r} is damaged; get the patch again")
        return data


class _Cut:
    """Cuts bytes off the front, no more than there are."""

    def __init__(self, data: bytes) -> None:
        self.rest = memoryview(data)

    def __call__(self, size: int) -> bytes:
        if type(size) is not int or not 0 <= size <= len(self.rest):
            raise ValueError("too short")
        out, self.rest = bytes(self.rest[:size]), self.rest[size:]
        return out
