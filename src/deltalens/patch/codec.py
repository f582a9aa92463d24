"""One tensor's change as bytes, and back. Pure: bytes in, bytes out; bit level throughout.

`conditioned` (16-bit floats): how far a word moved, in units of the last place (the wrapping difference of the words,
zigzag), depends on the source's exponent, which both ends hold; each difference is coded under its exponent's own
model. `sparse`: gaps between the changed words and their XOR. `planes`: XOR split into byte planes. `raw`: the result
itself. All but the first end in zstd.
"""

from __future__ import annotations

import struct

import numba
import numpy as np
import zstandard

from deltalens.errors import PatchError
from deltalens.patch import rans

__all__ = ["CODECS", "MOST_PACKED", "decode_tensor", "encode_tensor"]

CODECS = ("unchanged", "conditioned", "sparse", "planes", "raw")
EXPONENT_SHIFT = {"BF16": 7, "F16": 10}
TOKENS = 64  # 0 … 15 stand for themselves; above, 4 tokens an octave and the remaining bits raw
DIRECT = 16
RARE = 256  # contexts with fewer words than this share one model
SMALL_BYTES = 1 << 16  # below this every codec is tried
MOST_PACKED = 1 << 16  # zstd's densest block is 4 bytes for 128 KiB: what claims more is refused before memory is taken
SPARSE_UP_TO = 0.05  # share of changed words up to which gaps are tried


def encode_tensor(source: np.ndarray, trained: np.ndarray, dtype: str, width: int, *, fast: bool) -> tuple[str, bytes]:
    """The smallest encoding of `trained` given `source`.

    Args:
        source, trained: stored bytes, uint8, equally long.
        dtype: safetensors code; decides whether words have an exponent.
        width: bytes a word.
        fast: zstd level 1 and no trial of several codecs.

    Returns:
        the codec's name, and the frame's bytes (empty for `unchanged`).
    """
    before, after = _words(source, width), _words(trained, width)
    changed = int(np.count_nonzero(before != after))
    if changed == 0:
        return "unchanged", b""
    level = 1 if fast else 9
    conditioned = dtype in EXPONENT_SHIFT
    small = source.size <= SMALL_BYTES and not fast
    found: list[tuple[str, bytes]] = []
    if conditioned:
        found.append(("conditioned", _encode_conditioned(before, after, EXPONENT_SHIFT[dtype])))
    if changed <= SPARSE_UP_TO * before.size and (not fast or not conditioned):
        found.append(("sparse", _encode_sparse(before, after, level)))
    if small or not found:
        found.append(("planes", _compress(_split(before ^ after, width), 1 if fast else 3)))
        found.append(("raw", _compress(trained, 1 if fast else 3)))
    return min(found, key=lambda item: len(item[1]))


def decode_tensor(codec: str, frame: bytes, source: np.ndarray, dtype: str, width: int) -> np.ndarray:
    """The result's bytes (uint8). `source` is read only.

    Raises:
        PatchError: the frame is not what its codec writes (the caller names file and tensor).
    """
    if codec == "unchanged":
        return source
    if codec == "raw":
        return np.frombuffer(_decompress(frame, source.size), np.uint8)
    before = _words(source, width)
    if codec == "planes":
        delta = _join(np.frombuffer(_decompress(frame, source.size), np.uint8), width)
        return (before ^ delta).view(np.uint8)
    if codec == "sparse":
        return _decode_sparse(frame, before, width)
    if codec == "conditioned" and dtype in EXPONENT_SHIFT:
        return _decode_conditioned(frame, before, EXPONENT_SHIFT[dtype])
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


# --- conditioned: rANS under the source's exponent -------------------------------------------------------------------


def _context_map(counts: np.ndarray) -> np.ndarray:
    """Exponent → context (uint8[256]): frequent exponents have a model of their own, the rest share context 0."""
    own = np.flatnonzero(counts >= RARE)
    out = np.zeros(256, np.uint8)
    out[own] = np.arange(1, own.size + 1) if own.size < 256 else np.arange(own.size)
    return out


def _encode_conditioned(before: np.ndarray, after: np.ndarray, shift: int) -> bytes:
    exponents, tokens = np.empty(before.size, np.uint8), np.empty(before.size, np.uint8)
    joint = np.zeros((256, TOKENS), np.int64)
    extra_bits = _tokenise(before, after, shift, exponents, tokens, joint)
    contexts = _context_map(joint.sum(axis=1))
    pooled = np.zeros((int(contexts.max()) + 1, TOKENS), np.int64)
    np.add.at(pooled, contexts, joint)
    frequencies = np.zeros(pooled.shape, np.uint16)
    for c in range(pooled.shape[0]):
        if pooled[c].any():
            frequencies[c] = rans.normalise(pooled[c])
    extra = _pack_extra(before, after, extra_bits)
    starts, _ = rans.slot_table(frequencies)
    words = rans.encode(tokens, contexts[exponents], frequencies, starts)
    model = _compress(contexts.tobytes() + _pack_model(frequencies), 9)
    head = struct.pack("<HHII", frequencies.shape[0], len(model), words.size, extra.size)
    return b"".join([head, model, words.tobytes(), extra.tobytes()])


def _pack_model(frequencies: np.ndarray) -> bytes:
    """Low bytes, then high bytes, token by token: what zstd packs best."""
    return _split(np.ascontiguousarray(frequencies.T).reshape(-1), 2).tobytes()


def _decode_conditioned(frame: bytes, before: np.ndarray, shift: int) -> np.ndarray:
    if len(frame) < 12:
        raise PatchError("a frame is cut short")
    count, model_bytes, word_count, extra_count = struct.unpack_from("<HHII", frame)
    if count > 256 or len(frame) != 12 + model_bytes + 2 * word_count + 8 * extra_count:
        raise PatchError("a frame does not have the length it says")
    model = np.frombuffer(_decompress(frame[12 : 12 + model_bytes], 256 + 2 * count * TOKENS), np.uint8)
    contexts = model[:256].copy()
    frequencies = np.ascontiguousarray(_join(model[256:], 2).reshape(TOKENS, count).T)
    sums = frequencies.sum(axis=1, dtype=np.int64)
    if contexts.max() >= count or not np.isin(sums, (0, 1 << rans.PRECISION)).all():
        raise PatchError("a frame's model is damaged")
    starts, table = rans.slot_table(frequencies)
    words = np.frombuffer(frame, np.uint16, word_count, 12 + model_bytes).copy()  # aligned, and as the kernel takes it
    extra = np.frombuffer(frame[12 + model_bytes + 2 * word_count :], np.uint64)
    tokens = np.empty(before.size, np.uint8)
    place = _contexts_of(before, shift, contexts)
    if rans.decode(words, place, frequencies, starts, table, tokens) != word_count:
        raise PatchError("a frame's code words are damaged")
    out = np.empty(before.size, np.uint16)
    if _rebuild(before, tokens, extra, out) != extra_count:
        raise PatchError("a frame's extra bits are damaged")
    return out.view(np.uint8)


@numba.njit(nogil=True, cache=True, inline="always")
def _zigzag(before, after):  # type: ignore[no-untyped-def]
    step = np.int32(np.int16(np.uint16(after - before)))
    return np.uint32((step << 1) ^ (step >> 15)) & np.uint32(0xFFFF)


@numba.njit(nogil=True, cache=True, inline="always")
def _bits_of(value):  # type: ignore[no-untyped-def]
    bits = 4
    while (value >> np.uint32(bits + 1)) != 0:
        bits += 1
    return bits  # of the leading one, for values of at least DIRECT


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _tokenise(before, after, shift, exponents, tokens, joint):  # type: ignore[no-untyped-def]
    """Fill exponents and tokens, count both jointly; returns how many raw bits follow."""
    extra = 0
    for i in range(before.size):
        value = _zigzag(before[i], after[i])
        exponent = (before[i] & np.uint16(0x7FFF)) >> np.uint16(shift)
        if value < DIRECT:
            token = np.uint32(value)
        else:
            bits = _bits_of(value)
            token = np.uint32(DIRECT + (bits - 4) * 4) + ((value >> np.uint32(bits - 2)) & np.uint32(3))
            extra += bits - 2
        exponents[i] = np.uint8(exponent)
        tokens[i] = np.uint8(token)
        joint[exponent, token] += 1
    return extra


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _pack_extra(before, after, total):  # type: ignore[no-untyped-def]
    out = np.zeros((total + 63) // 64, np.uint64)
    at = 0
    for i in range(before.size):
        value = _zigzag(before[i], after[i])
        if value >= DIRECT:
            bits = _bits_of(value) - 2
            rest = np.uint64(value & ((np.uint32(1) << np.uint32(bits)) - np.uint32(1)))
            word, offset = at >> 6, at & 63
            out[word] |= rest << np.uint64(offset)
            if offset + bits > 64:
                out[word + 1] |= rest >> np.uint64(64 - offset)
            at += bits
    return out


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _contexts_of(before, shift, contexts):  # type: ignore[no-untyped-def]
    out = np.empty(before.size, np.uint8)
    for i in range(before.size):
        out[i] = contexts[(before[i] & np.uint16(0x7FFF)) >> np.uint16(shift)]
    return out


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _rebuild(before, tokens, extra, out):  # type: ignore[no-untyped-def]
    """Words from tokens and raw bits; returns the number of 64-bit words read, −1 where there are too few."""
    at = 0
    limit = extra.size * 64
    for i in range(before.size):
        token = np.uint32(tokens[i])
        value = token
        if token >= DIRECT:
            bits = np.int64((token - np.uint32(DIRECT)) >> np.uint32(2)) + 2
            if at + bits > limit:
                return -1
            word, offset = at >> 6, at & 63
            rest = extra[word] >> np.uint64(offset)
            if offset + bits > 64:
                rest |= extra[word + 1] << np.uint64(64 - offset)
            rest &= (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
            top = np.uint32(4) | ((token - np.uint32(DIRECT)) & np.uint32(3))
            value = (top << np.uint32(bits)) | np.uint32(rest)
            at += int(bits)
        step = (value >> np.uint32(1)) ^ (np.uint32(0) - (value & np.uint32(1)))
        out[i] = np.uint16(np.uint32(before[i]) + step)
    return (at + 63) >> 6
