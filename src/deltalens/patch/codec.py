"""One tensor's change as bytes, and back. Pure: bytes in, bytes out; bit level throughout.

`conditioned` (16-bit floats, conditioned.py): differences under the source's exponent. `sparse`: gaps between the
changed words and their XOR. `planes`: XOR split into byte planes. `raw`: the result itself; `new`: the same where
there is no source. All but the first end in zstd.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import zstandard

from deltalens.errors import PatchError
from deltalens.patch import conditioned
from deltalens.patch.conditioned import EXPONENT_SHIFT

__all__ = ["CODECS", "MOST_PACKED", "Encoding", "decode_tensor", "encode_new", "encode_tensor"]

CODECS = ("unchanged", "conditioned", "sparse", "planes", "raw", "new")
SMALL_BYTES = 1 << 16  # below this every codec is tried
MOST_PACKED = 1 << 16  # zstd's densest block is 4 bytes for 128 KiB: what claims more is refused before memory is taken
SPARSE_UP_TO = 0.05  # share of changed words up to which gaps are tried


@dataclass(frozen=True, slots=True)
class Encoding:
    """A tensor's codec, its frame, and the model that `conditioned` keeps apart: a patch packs all models together."""

    codec: str
    frame: bytes
    model: bytes = b""


def encode_tensor(
    source: np.ndarray, trained: np.ndarray, dtype: str, width: int, *, columns: int, fast: bool
) -> Encoding:
    """The smallest encoding of `trained` given `source`.

    Args:
        source, trained: stored bytes, uint8, equally long.
        dtype: safetensors code; decides whether words have an exponent.
        width: bytes a word.
        columns: words in a row.
        fast: zstd level 1 and no trial of several codecs.
    """
    before, after = _words(source, width), _words(trained, width)
    changed = int(np.count_nonzero(before != after))
    if changed == 0:
        return Encoding("unchanged", b"")
    small = source.size <= SMALL_BYTES and not fast
    found: list[Encoding] = []
    if dtype in EXPONENT_SHIFT:
        model, frame = conditioned.encode(before, after, EXPONENT_SHIFT[dtype], columns)
        found.append(Encoding("conditioned", frame, model))
    if small or not found:
        if changed <= SPARSE_UP_TO * before.size:
            found.append(Encoding("sparse", _encode_sparse(before, after, 1 if fast else 9)))
        if small or not found:
            found.append(Encoding("planes", _compress(_split(before ^ after, width), 1 if fast else 3)))
            found.append(Encoding("raw", _compress(trained, 1 if fast else 3)))
    return min(found, key=lambda item: len(item.frame) + len(item.model) // 2)  # models halve at least, in zstd


def encode_new(trained: np.ndarray, *, fast: bool) -> Encoding:
    """A tensor that the source does not have in this shape and dtype."""
    return Encoding("new", _compress(trained, 1 if fast else 9))


def decode_tensor(encoding: Encoding, source: np.ndarray, dtype: str, width: int, *, columns: int) -> np.ndarray:
    """The result's bytes (uint8). `source` is read only; `new` and `raw` read only its length.

    Raises:
        PatchError: the frame is not what its codec writes (the caller names file and tensor).
    """
    codec, frame = encoding.codec, encoding.frame
    if codec == "unchanged":
        return source
    if codec in ("raw", "new"):
        return np.frombuffer(_decompress(frame, source.size), np.uint8)
    before = _words(source, width)
    if codec == "planes":
        delta = _join(np.frombuffer(_decompress(frame, source.size), np.uint8), width)
        return (before ^ delta).view(np.uint8)
    if codec == "sparse":
        return _decode_sparse(frame, before, width)
    if codec == "conditioned" and dtype in EXPONENT_SHIFT:
        return conditioned.decode(encoding.model, frame, before, EXPONENT_SHIFT[dtype], columns).view(np.uint8)
    raise PatchError(f"unknown codec {codec!r} for {dtype}")


def _words(raw: np.ndarray, width: int) -> np.ndarray:
    return raw.view(np.dtype(f"<u{width}"))


def _compress(data: np.ndarray | bytes, level: int) -> bytes:
    return zstandard.ZstdCompressor(level=level).compress(data if isinstance(data, bytes) else data.tobytes())


def _decompress(frame: bytes, expected: int) -> bytes:
    """Decompress exactly `expected` bytes; a frame that claims more is refused before memory is taken."""
    try:
        if zstandard.frame_content_size(frame) != expected or expected > len(frame) * MOST_PACKED:
            raise PatchError("a compressed part has the wrong length")
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=expected)
    except zstandard.ZstdError as error:
        raise PatchError(f"a compressed part is damaged ({error})") from None


def _split(words: np.ndarray, width: int) -> np.ndarray:
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, width).T).reshape(-1)


def _join(planes: np.ndarray, width: int) -> np.ndarray:
    return _words(np.ascontiguousarray(planes.reshape(width, -1).T).reshape(-1), width)


# --- sparse: gaps and XORs -------------------------------------------------------------------------------------------


def _encode_sparse(before: np.ndarray, after: np.ndarray, level: int) -> bytes:
    delta = before ^ after
    places = np.flatnonzero(delta)
    gaps = _varints(np.diff(places, prepend=-1) - 1)
    values = _split(delta[places], before.itemsize)
    parts = [_compress(gaps, level), _compress(values, level)]
    return struct.pack("<QQQ", places.size, gaps.size, len(parts[0])) + b"".join(parts)


def _decode_sparse(frame: bytes, before: np.ndarray, width: int) -> np.ndarray:
    if len(frame) < 24:
        raise PatchError("a sparse frame is cut short")
    count, gap_bytes, first = struct.unpack_from("<QQQ", frame)
    if count > before.size or gap_bytes > 10 * count or first > len(frame) - 24:
        raise PatchError("a sparse frame claims more than its tensor holds")
    gaps = _unvarints(np.frombuffer(_decompress(frame[24 : 24 + first], gap_bytes), np.uint8), count)
    # Each gap first: the sum cannot then wrap around before it has left the tensor.
    if count and (gaps.min() < 0 or gaps.max() >= before.size or np.max(np.cumsum(gaps + 1)) > before.size):
        raise PatchError("a sparse frame points outside its tensor")
    places = np.cumsum(gaps + 1) - 1
    values = _join(np.frombuffer(_decompress(frame[24 + first :], count * width), np.uint8), width)
    out = before.copy()
    out[places] ^= values
    return out.view(np.uint8)


def _varints(values: np.ndarray) -> np.ndarray:
    """LEB128 of non-negative integers."""
    values = values.astype(np.uint64)
    lengths = np.maximum(1, (64 - _leading_zeros(values) + 6) // 7)
    ends = np.cumsum(lengths)
    out = np.zeros(int(ends[-1]) if values.size else 0, np.uint8)
    for k in range(int(lengths.max()) if values.size else 0):
        have = lengths > k
        more = (lengths > k + 1).astype(np.uint64) << np.uint64(7)
        piece = ((values >> np.uint64(7 * k)) & np.uint64(0x7F)) | more
        out[(ends - lengths + k)[have]] = piece[have].astype(np.uint8)
    return out


def _leading_zeros(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, 63 - np.floor(np.log2(np.maximum(values, 1).astype(np.float64))), 64).astype(np.int64)


def _unvarints(data: np.ndarray, count: int) -> np.ndarray:
    ends = np.flatnonzero(data < 0x80)
    if ends.size != count or (data.size and ends[-1] != data.size - 1):
        raise PatchError("a sparse frame's gaps are damaged")
    starts = np.concatenate([[0], ends[:-1] + 1]) if count else ends
    longest = int((ends - starts).max()) + 1 if count else 0
    if longest > 10:
        raise PatchError("a sparse frame's gaps are damaged")
    out = np.zeros(count, np.int64)
    for k in range(longest):
        have = starts + k <= ends
        out[have] |= (data[starts[have] + k].astype(np.int64) & 0x7F) << (7 * k)
    return out
