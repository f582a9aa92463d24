"""Codecs: every dtype, density and codec, bit for bit; damaged frames never crash and never pass unseen."""

import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deltalens.checkpoint.base import DTYPE_BYTES
from deltalens.errors import PatchError
from deltalens.patch import codec as codecs
from deltalens.patch import conditioned
from deltalens.patch.codec import Encoding, decode_tensor, encode_new, encode_tensor

# Zeros of both signs, infinities, quiet and signalling NaNs with payloads, subnormals, as 16-bit words.
SPECIAL = np.array([0, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF, 0x7C00, 0x7C01, 0xFE01, 1, 0x8001], np.uint16)


def make_pair(dtype: str, size: int, density: float, kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stored bytes of a source and a trained tensor, of which about `density` of the words differ."""
    rng = np.random.default_rng(seed)
    word = np.dtype(f"<u{DTYPE_BYTES[dtype]}")
    if kind == "weights" and word.itemsize == 2:
        values = (rng.standard_normal(size) * 0.02).astype(np.float32)
        source = (values.view(np.uint32) >> 16).astype(word) if dtype == "BF16" else values.astype("<f2").view(word)
    else:
        source = rng.integers(0, 256, size * word.itemsize, np.uint8).view(word)
    trained = source.copy()
    moved = rng.random(size) < density
    if kind == "weights":
        trained[moved] += rng.integers(-40, 41, int(moved.sum())).astype(word)
    elif kind == "special" and word.itemsize >= 2:
        for side in (source, trained):
            side.view("<u2")[:] = rng.choice(SPECIAL, side.view("<u2").size)
        trained[~moved] = source[~moved]
    else:
        trained[moved] = rng.integers(0, 256, int(moved.sum()) * word.itemsize, np.uint8).view(word)
    return source.view(np.uint8), trained.view(np.uint8)


pairs = st.builds(
    lambda dtype, size, density, kind, seed: (dtype, *make_pair(dtype, size, density, kind, seed)),
    st.sampled_from(sorted(DTYPE_BYTES)),
    st.integers(1, 5000) | st.integers(1, 20),
    st.sampled_from([0.0, 0.001, 0.03, 0.3, 1.0]) | st.floats(0, 1),
    st.sampled_from(["weights", "special", "random"]),
    st.integers(0, 2**32),
)


@settings(max_examples=300, deadline=None)
@given(pairs, st.booleans())
def test_round_trip(pair, fast):
    dtype, source, trained = pair
    width = DTYPE_BYTES[dtype]
    kept = source.copy()
    columns = source.size // width
    encoding = encode_tensor(source, trained, dtype, width, columns=columns, fast=fast)
    source.flags.writeable = False  # as a tensor of an earlier patch of a chain may be
    made = decode_tensor(encoding, source, dtype, width, columns=columns)
    assert made.dtype == np.uint8
    assert made.tobytes() == trained.tobytes()
    assert source.tobytes() == kept.tobytes()
    assert (encoding.codec == "unchanged") == (kept.tobytes() == trained.tobytes())
    # No codec is worse than storing the tensor, but for its fixed part.
    assert len(encoding.frame) + len(encoding.model) <= trained.size + trained.size // 8 + 512
    new = encode_new(trained, fast=fast)
    assert decode_tensor(new, np.empty_like(source), dtype, width, columns=columns).tobytes() == trained.tobytes()


def forced_encodings(source: np.ndarray, trained: np.ndarray, dtype: str) -> dict[str, Encoding]:
    """The tensor in every codec that can carry it."""
    width = DTYPE_BYTES[dtype]
    word = np.dtype(f"<u{width}")
    before, after = source.view(word), trained.view(word)
    frames = {
        "planes": (codecs._compress(codecs._split(before ^ after, width), 3),),
        "raw": (codecs._compress(trained, 3),),
    }
    if (before != after).any():
        frames["sparse"] = (codecs._encode_sparse(before, after, 3),)
    else:
        frames["unchanged"] = (b"",)
    if dtype in conditioned.EXPONENT_SHIFT:
        frames["conditioned"] = conditioned.encode(before, after, conditioned.EXPONENT_SHIFT[dtype], before.size)[::-1]
    return {name: Encoding(name, *parts) for name, parts in frames.items()}


@settings(max_examples=150, deadline=None)
@given(pairs)
def test_every_codec_round_trips(pair):
    dtype, source, trained = pair
    width = DTYPE_BYTES[dtype]
    for name, encoding in forced_encodings(source, trained, dtype).items():
        made = decode_tensor(encoding, source, dtype, width, columns=source.size // width)
        assert made.tobytes() == trained.tobytes(), name


def test_every_codec_is_chosen_where_it_is_best():
    def choice(dtype: str, source: np.ndarray, trained: np.ndarray) -> str:
        width = DTYPE_BYTES[dtype]
        return encode_tensor(source, trained, dtype, width, columns=source.size // width, fast=False).codec

    assert choice("BF16", *make_pair("BF16", 5000, 0.0, "weights", 1)) == "unchanged"
    assert choice("BF16", *make_pair("BF16", 5000, 0.5, "weights", 1)) == "conditioned"
    assert choice("F32", *make_pair("F32", 5000, 0.01, "weights", 1)) == "sparse"
    assert choice("F32", *make_pair("F32", 5000, 0.6, "weights", 1)) == "planes"
    noise = np.random.default_rng(0).integers(0, 256, 20000, np.uint8)
    assert choice("F32", noise, np.zeros(20000, np.uint8)) == "raw"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**62) | st.integers(0, 300), max_size=50))
@example([0, 127, 128, 16383, 16384, 2**32 - 1, 2**49 - 1, 2**49, 2**62])
def test_varints(values):
    data = codecs._varints(np.array(values, np.int64))
    assert codecs._unvarints(data, len(values)).tolist() == values
    if values:
        with pytest.raises(PatchError):
            codecs._unvarints(data[:-1], len(values))
        with pytest.raises(PatchError):
            codecs._unvarints(data, len(values) + 1)


@settings(max_examples=200, deadline=None)
@given(pairs.filter(lambda pair: pair[1].size <= 400), st.data())
def test_damaged_frames_raise_or_decode_to_the_right_length(pair, data):
    """The frame's hash is checked elsewhere; here a frame that lies must not do more than be wrong."""
    dtype, source, trained = pair
    encodings = forced_encodings(source, trained, dtype)
    name = data.draw(st.sampled_from(sorted(set(encodings) - {"unchanged"})))
    parts = [bytearray(encodings[name].frame), bytearray(encodings[name].model)]
    for _ in range(data.draw(st.integers(1, 3))):
        part = parts[data.draw(st.integers(0, 1)) if parts[1] else 0]
        part[data.draw(st.integers(0, len(part) - 1))] ^= data.draw(st.integers(1, 255))
    frame, model = (
        bytes(part[: data.draw(st.integers(0, len(part)))]) if data.draw(st.booleans()) else bytes(part)
        for part in parts
    )
    width = DTYPE_BYTES[dtype]
    try:
        made = decode_tensor(Encoding(name, frame, model), source, dtype, width, columns=source.size // width)
    except PatchError:
        return
    assert made.size == trained.size


def test_bombs_are_refused_before_memory_is_taken():
    """A frame that claims far more than zstd can pack into its bytes, and gaps that claim a huge varint."""
    honest = codecs._compress(b"\0" * 100, 3)
    claim = honest[:4] + bytes([0xE0]) + struct.pack("<Q", 1 << 40) + honest[6:]
    with pytest.raises(PatchError):
        codecs._decompress(claim, 1 << 40)
    bomb = codecs._compress(b"\0" * (1 << 26), 3)
    assert len(bomb) * codecs.MOST_PACKED > 1 << 26  # what zstd packs best is not refused
    assert len(codecs._decompress(bomb, 1 << 26)) == 1 << 26
    with pytest.raises(PatchError):
        codecs._decompress(bomb, 100)
    long_varint = np.full(100_000, 0x80, np.uint8)
    long_varint[-1] = 0
    with pytest.raises(PatchError):
        codecs._unvarints(long_varint, 1)


@pytest.mark.parametrize("gaps", [[99, 0], [2**62, 2**62], [2**62, 2**62, 2**62, 2**62, 5], [100]])
def test_sparse_positions_outside_the_tensor_are_refused(gaps):
    packed = [codecs._compress(codecs._varints(np.array(gaps)), 1), codecs._compress(b"\1" * len(gaps), 1)]
    size = codecs._varints(np.array(gaps)).size
    frame = struct.pack("<QQQ", len(gaps), size, len(packed[0])) + b"".join(packed)
    with pytest.raises(PatchError, match="outside"):
        decode_tensor(Encoding("sparse", frame), np.zeros(100, np.uint8), "U8", 1, columns=100)
