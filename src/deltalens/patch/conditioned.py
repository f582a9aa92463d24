"""16-bit floats coded under the source: how far a word moved depends on its exponent, which both ends hold.

The wrapping difference of the words (units of the last place, zigzag) becomes a token and remaining bits; tokens are
coded by rANS, one model for each run of neighbouring exponents. Where rows differ much in how many of their words
changed (an embedding: tokens that were never seen do not move), the rows fall into eight classes of activity, sent at
three bits a row, each with models of its own. docs/patch.md describes the bytes.
"""

from __future__ import annotations

import numba
import numpy as np

from deltalens.errors import PatchError
from deltalens.patch import rans

__all__ = ["EXPONENT_SHIFT", "decode", "encode"]

EXPONENT_SHIFT = {"BF16": 7, "F16": 10}
TOKENS = 64  # 0 … 15 stand for themselves; above, 4 tokens an octave and the remaining bits raw
DIRECT = 16
EXPONENTS = 256
CLASSES, CLASS_BITS = 8, 3  # of rows
LEAST_ROWS = 64  # and columns, for rows to be told apart
DISPERSED = 40.0  # least variance of the rows' changed words over its mean for which it pays; chance gives at most 1
FINE_FROM = 1 << 14  # changed words from which frequencies are kept to a quarter octave instead of half of one
SYMMETRIC, FINE, BY_ROW = 1, 2, 4  # flags of a model
# What a group's model and each of its codes cost in the file, in bits: measured, after zstd has gone over all models.
GROUP_BITS, CODE_BITS = 10.0, 5.0
OCTAVES = rans.PRECISION
QUARTERS = np.array([1 << 30, 902905651, 759250125, 638450708], np.int64)  # 2³⁰ ⁻ ⁱ⁄⁴; integers: alike on any machine


def encode(before: np.ndarray, after: np.ndarray, shift: int, columns: int) -> tuple[bytes, bytes]:
    """The model and the frame of `after` given `before`.

    Args:
        before, after: words (n,), uint16.
        shift: bits below the exponent.
        columns: words in a row; divides n.
    """
    tokens, joint = np.empty(before.size, np.uint8), np.zeros((EXPONENTS, TOKENS), np.int64)
    extra_bits = _tokenise(before, after, shift, tokens, joint)
    fine = bool(before.size - joint[:, 0].sum() >= FINE_FROM)
    model, bits = _fit(joint, fine)
    classes = np.zeros(before.size // columns if columns else 0, np.uint8)
    if min(columns, classes.size) >= LEAST_ROWS:
        moved = _changed_in_rows(tokens, columns)
        if moved.var() > DISPERSED * moved.mean():
            ranked = np.empty(classes.size, np.uint8)
            ranked[np.argsort(moved, kind="stable")] = np.arange(classes.size) * CLASSES // classes.size
            joint = np.zeros((CLASSES * EXPONENTS, TOKENS), np.int64)
            _count_by_row(before, tokens, shift, ranked, columns, joint)
            by_row, by_row_bits = _fit(joint, fine)
            if by_row_bits + CLASS_BITS * classes.size < bits:
                model, classes = by_row, ranked
    groups, frequencies = _read_model(model)
    starts, _ = rans.slot_table(frequencies)
    words = rans.encode(tokens, _contexts(before, shift, groups, classes, columns), frequencies, starts)
    extra = _pack_extra(before, after, extra_bits).tobytes()[: (extra_bits + 7) // 8]
    return model, b"".join([_pack_classes(classes) if model[0] & BY_ROW else b"", words.tobytes(), extra])


def decode(model: bytes, frame: bytes, before: np.ndarray, shift: int, columns: int) -> np.ndarray:
    """The words (uint16) that `encode` was given.

    Raises:
        PatchError: model and frame are not what `encode` writes.
    """
    groups, frequencies = _read_model(model)
    classes = np.zeros(before.size // columns if columns else 0, np.uint8)
    if model[0] & BY_ROW:
        size = (CLASS_BITS * classes.size + 7) // 8
        if len(frame) < size:
            raise PatchError("a frame is cut short")
        classes = _unpack_classes(frame[:size], classes.size)
        frame = frame[size:]
    starts, table = rans.slot_table(frequencies)
    words = np.frombuffer(frame + b"\0" * (len(frame) & 1), np.uint16)
    tokens = np.empty(before.size, np.uint8)
    used = 2 * rans.decode(
        words.copy(), _contexts(before, shift, groups, classes, columns), frequencies, starts, table, tokens
    )
    if not 0 <= used <= len(frame):
        raise PatchError("a frame's code words are damaged")
    rest = frame[used:]
    extra = np.frombuffer(rest + b"\0" * (-len(rest) % 8), np.uint64)
    out = np.empty(before.size, np.uint16)
    bits = _rebuild(before, tokens, extra, out)
    if bits < 0 or (bits + 7) // 8 != len(rest):
        raise PatchError("a frame's extra bits are damaged")
    return out


def _pack_classes(classes: np.ndarray) -> bytes:
    return np.packbits(np.unpackbits(classes[:, None], axis=1)[:, -CLASS_BITS:]).tobytes()


def _unpack_classes(data: bytes, rows: int) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=CLASS_BITS * rows).reshape(rows, CLASS_BITS)
    return (bits << np.arange(CLASS_BITS - 1, -1, -1, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)


# --- models ----------------------------------------------------------------------------------------------------------


def _fit(joint: np.ndarray, fine: bool) -> tuple[bytes, float]:
    """The cheapest model found for counts (row classes × exponents, tokens), and the bits that it and its data take."""
    used = int(np.flatnonzero(joint.any(axis=0)).max(initial=0)) + 1
    joint = np.ascontiguousarray(joint[:, : min(used + 1 - used % 2, TOKENS)])  # no token without its twin
    fits = [(*_merge(joint, fine, symmetric), symmetric) for symmetric in (True, False)]
    last, counts, bits, symmetric = min(fits, key=lambda fit: fit[2])
    by_row = joint.shape[0] > EXPONENTS
    parts = [bytes([SYMMETRIC * symmetric + FINE * fine + BY_ROW * by_row]), last.astype(np.uint8).tobytes()]
    for row in counts:
        codes = _quantise(row, fine, symmetric)
        kept = np.delete(codes, _twins(codes.size)) if symmetric else codes
        kept = kept[: int(np.flatnonzero(kept).max(initial=-1)) + 1]
        parts.append(bytes([kept.size]) + kept.astype(np.uint8).tobytes())
    return b"".join(parts), bits


def _twins(size: int) -> np.ndarray:
    """Tokens of steps upward, whose code a symmetric model takes from the step downward."""
    return np.arange(2, min(size, DIRECT - 1), 2)


def _read_model(model: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Group of each exponent of each row class (uint8, classes × 256), and the groups' frequencies (n, 64), uint16."""
    if not model or model[0] > SYMMETRIC + FINE + BY_ROW:
        raise PatchError("a model is damaged")
    symmetric, fine = bool(model[0] & SYMMETRIC), bool(model[0] & FINE)
    groups = np.zeros(EXPONENTS * (CLASSES if model[0] & BY_ROW else 1), np.uint8)
    at, first, count = 1, 0, 0
    while first < groups.size:  # a group's last exponent; 255 is a row class's end
        if at >= len(model) or count == 256 or first % EXPONENTS > model[at]:
            raise PatchError("a model is damaged")
        end = first - first % EXPONENTS + model[at] + 1
        groups[first:end] = count
        at, first, count = at + 1, end, count + 1
    weights = np.zeros((count, TOKENS), np.int64)
    plain = np.delete(np.arange(TOKENS), _twins(TOKENS)) if symmetric else np.arange(TOKENS)
    for row in weights:
        size = model[at] if at < len(model) else 0
        codes = np.frombuffer(model[at + 1 : at + 1 + size], np.uint8)
        if not 0 < codes.size == size <= plain.size or codes.max() > _most(fine) or not codes.any():
            raise PatchError("a model is damaged")
        row[plain[:size]] = _weights(codes.astype(np.int64), fine)
        if symmetric:
            row[_twins(TOKENS)] = row[_twins(TOKENS) - 1]
        at += 1 + size
    if at != len(model):
        raise PatchError("a model is damaged")
    return groups, np.stack([rans.normalise(row) for row in weights])


@numba.njit(nogil=True, cache=True, inline="always")
def _most(fine):  # type: ignore[no-untyped-def]
    return 1 + OCTAVES * (4 if fine else 2)


@numba.njit(nogil=True, cache=True)
def _weights(codes, fine):  # type: ignore[no-untyped-def]
    """What a code stands for: 0 for a token that does not occur, else 2³⁰ halved once in (2 or 4) codes from 1 on."""
    out = np.zeros(codes.size, np.int64)
    for i in range(codes.size):
        if codes[i] > 0:
            quarters = (codes[i] - 1) * (1 if fine else 2)
            out[i] = QUARTERS[quarters & 3] >> (quarters >> 2)
    return out


@numba.njit(nogil=True, cache=True)
def _quantise(counts, fine, symmetric):  # type: ignore[no-untyped-def]
    """Codes of counts; those of steps of one size down and up are made equal where the model is symmetric."""
    out = np.zeros(counts.size, np.int64)
    total = np.float64(counts.sum())
    steps = 4 if fine else 2
    for s in range(counts.size):
        count = np.float64(counts[s])
        if symmetric and 1 <= s < DIRECT - 1:
            twin = ((s - 1) ^ 1) + 1
            count = np.float64(0.5) * (count + (counts[twin] if twin < counts.size else 0))
        if count > 0:
            out[s] = min(1 + np.int64(np.rint(-np.log2(count / total) * steps)), _most(fine))
    return out


@numba.njit(nogil=True, cache=True)
def _cost(counts, fine, symmetric):  # type: ignore[no-untyped-def]
    """Bits of a group: its model and its data."""
    codes = _quantise(counts, fine, symmetric)
    frequencies = rans.normalise(_weights(codes, fine))
    bits, present = 0.0, 0
    for s in range(counts.size):
        if counts[s] > 0:
            bits += counts[s] * (rans.PRECISION - np.log2(np.float64(frequencies[s])))
        if codes[s] > 0 and not (symmetric and s > 0 and s < DIRECT - 1 and s & 1 == 0):
            present += 1
    return bits + GROUP_BITS + CODE_BITS * present


@numba.njit(nogil=True, cache=True)
def _merge(joint, fine, symmetric):  # type: ignore[no-untyped-def]
    """Join neighbouring exponents of a row class for as long as that saves bits, the best pair first.

    Returns each group's last exponent (255 for the last of a class: together they cover all), counts, and all bits.
    """
    classes = joint.shape[0] // EXPONENTS
    last = np.empty(joint.shape[0], np.int64)
    counts = np.zeros(joint.shape, np.int64)
    owner = np.empty(joint.shape[0], np.int64)
    n = 0
    for k in range(classes):
        for e in range(EXPONENTS):
            some = joint[k * EXPONENTS + e].sum() > 0
            if some or (e == EXPONENTS - 1 and (n == 0 or owner[n - 1] != k)):
                last[n], owner[n] = e, k
                counts[n] = joint[k * EXPONENTS + e]
                counts[n, 0] += not some  # a class without words: a model that says so
                n += 1
    own, gain = np.empty(n), np.full(n, -np.inf)
    for i in range(n):
        own[i] = _cost(counts[i], fine, symmetric)
    for i in range(n - 1):
        if owner[i] == owner[i + 1]:
            gain[i] = own[i] + own[i + 1] - _cost(counts[i] + counts[i + 1], fine, symmetric)
    while n > 1:
        best = np.argmax(gain[:n])
        if gain[best] <= 0 and n <= 256:
            break
        own[best] += own[best + 1] - gain[best]
        counts[best] += counts[best + 1]
        last[best] = last[best + 1]
        for i in range(best + 1, n - 1):
            own[i], gain[i], last[i], owner[i] = own[i + 1], gain[i + 1], last[i + 1], owner[i + 1]
            counts[i] = counts[i + 1]
        n -= 1
        gain[n - 1] = -np.inf
        for i in range(best - 1 if best else 0, best + 1 if best < n - 1 else n - 1):
            gain[i] = -np.inf
            if owner[i] == owner[i + 1]:
                gain[i] = own[i] + own[i + 1] - _cost(counts[i] + counts[i + 1], fine, symmetric)
    for i in range(n):
        if i == n - 1 or owner[i] != owner[i + 1]:
            last[i] = EXPONENTS - 1
    return last[:n].copy(), counts[:n].copy(), own[:n].sum()


# --- words and tokens ------------------------------------------------------------------------------------------------


@numba.njit(nogil=True, cache=True, inline="always")
def _exponent(word, shift):  # type: ignore[no-untyped-def]
    return (word & np.uint16(0x7FFF)) >> np.uint16(shift)


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
def _tokenise(before, after, shift, tokens, joint):  # type: ignore[no-untyped-def]
    """Fill tokens, count them under their exponents; returns how many raw bits follow."""
    extra = 0
    for i in range(before.size):
        value = _zigzag(before[i], after[i])
        if value < DIRECT:
            token = np.uint32(value)
        else:
            bits = _bits_of(value)
            token = np.uint32(DIRECT + (bits - 4) * 4) + ((value >> np.uint32(bits - 2)) & np.uint32(3))
            extra += bits - 2
        tokens[i] = np.uint8(token)
        joint[_exponent(before[i], shift), token] += 1
    return extra


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _changed_in_rows(tokens, columns):  # type: ignore[no-untyped-def]
    out = np.zeros(tokens.size // columns, np.int64)
    for r in range(out.size):
        for i in range(r * columns, (r + 1) * columns):
            out[r] += tokens[i] != 0
    return out


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _count_by_row(before, tokens, shift, classes, columns, joint):  # type: ignore[no-untyped-def]
    for r in range(classes.size):
        first = np.int64(classes[r]) * EXPONENTS
        for i in range(r * columns, (r + 1) * columns):
            joint[first + np.int64(_exponent(before[i], shift)), tokens[i]] += 1


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _contexts(before, shift, groups, classes, columns):  # type: ignore[no-untyped-def]
    out = np.empty(before.size, np.uint8)
    for r in range(classes.size):
        own = groups[np.int64(classes[r]) * EXPONENTS : (np.int64(classes[r]) + 1) * EXPONENTS]
        words, row = before[r * columns : (r + 1) * columns], out[r * columns : (r + 1) * columns]
        for i in range(columns):
            row[i] = own[_exponent(words[i], shift)]
    return out


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _pack_extra(before, after, total):  # type: ignore[no-untyped-def]
    out = np.zeros((total + 63) // 64, np.uint64)
    at = 0
    for i in range(before.size if total else 0):
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
def _rebuild(before, tokens, extra, out):  # type: ignore[no-untyped-def]
    """Words from tokens and raw bits; returns the number of bits read, −1 where there are too few."""
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
    return at
