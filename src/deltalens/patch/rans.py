"""rANS with a model chosen by a context that both ends know: four interleaved 32-bit states, 16-bit renormalisation.

Duda 2013 (arXiv 1311.2540); interleaving after Giesen 2014 (arXiv 1402.3392). `constriction` 0.5 gives the same
sizes, but it takes one model a call, so that the coordinates would have to be sorted by context and back, decodes
about 50 million symbols a second, and holds the interpreter's lock; these loops decode several times that, in the
coordinates' own order, in as many threads as there are processors.
"""

from __future__ import annotations

import numba
import numpy as np

__all__ = ["PRECISION", "decode", "encode", "normalise", "slot_table"]

PRECISION = 14  # bits of a frequency: a context's frequencies add up to 2¹⁴
STATES = 4
LOW = np.uint64(1 << 16)  # a state lies in [2¹⁶, 2³²)


@numba.njit("uint16[::1](int64[::1])", nogil=True, cache=True)
def normalise(weights):  # type: ignore[no-untyped-def]
    """Weights (symbols,) of a sum in 1 … 2⁴⁷ as frequencies that add up to 2¹⁴, at least 1 where the weight is not 0.

    Integers only, so that both ends get the same; what rounding leaves goes to the largest.
    """
    size, total = 1 << PRECISION, weights.sum()
    out = np.zeros(weights.size, np.int64)
    for s in range(weights.size):
        if weights[s] > 0:
            out[s] = max(1, ((weights[s] << (PRECISION + 1)) + total) // (2 * total))
    out[np.argmax(out)] += size - out.sum()
    return out.astype(np.uint16)


def slot_table(frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each symbol's slots begin (contexts, symbols) uint16, and each slot's symbol (contexts, 2¹⁴) uint8."""
    contexts, symbols = frequencies.shape
    ends = np.cumsum(frequencies, axis=1, dtype=np.int64)
    starts = (ends - frequencies).astype(np.uint16)
    table = np.zeros((contexts, 1 << PRECISION), np.uint8)
    for c in range(contexts):
        table[c, : ends[c, -1]] = np.repeat(np.arange(symbols, dtype=np.uint8), frequencies[c])
    return starts, table


@numba.njit(
    "uint16[::1](uint8[::1], uint8[::1], uint16[:, ::1], uint16[:, ::1])",
    nogil=True,
    cache=True,
    boundscheck=False,
    error_model="numpy",
)
def encode(symbols, contexts, frequencies, starts):  # type: ignore[no-untyped-def]
    """Encode `symbols`, each under the model of its context; words are in the order in which `decode` reads them."""
    size = symbols.size
    out = np.empty(size + 16, np.uint16)  # a symbol emits at most one word
    at = out.size
    shift = np.uint64(PRECISION)
    # x // f as a product: x < 2³² and f ≤ 2¹⁴, so x/f is at least 2⁻¹⁴ away from the next integer unless it is one,
    # and 2⁻⁴⁸ relative is more than the product's rounding and less than that.
    inverse = np.empty(frequencies.shape)
    for c in range(frequencies.shape[0]):
        for s in range(frequencies.shape[1]):
            inverse[c, s] = (1.0 + 2.0**-48) / max(1, frequencies[c, s])
    x0 = x1 = x2 = x3 = LOW
    for k in range(size):
        i = size - 1 - k
        lane = i & 3
        x = x0 if lane == 0 else x1 if lane == 1 else x2 if lane == 2 else x3
        c, s = contexts[i], symbols[i]
        f = np.uint64(frequencies[c, s])
        over = (x >> np.uint64(32 - PRECISION)) >= f
        out[at - 1] = np.uint16(x & np.uint64(0xFFFF))
        at -= 1 if over else 0
        x = x >> np.uint64(16) if over else x
        q = np.uint64(np.int64(np.float64(np.int64(x)) * inverse[c, s]))
        x = (q << shift) + (x - q * f) + np.uint64(starts[c, s])
        if lane == 0:
            x0 = x
        elif lane == 1:
            x1 = x
        elif lane == 2:
            x2 = x
        else:
            x3 = x
    at -= 2 * STATES
    for lane, x in enumerate((x0, x1, x2, x3)):
        out[at + 2 * lane] = np.uint16(x & np.uint64(0xFFFF))
        out[at + 2 * lane + 1] = np.uint16(x >> np.uint64(16))
    return out[at:].copy()


@numba.njit(nogil=True, cache=True, boundscheck=False, inline="always")
def _step(x, c, frequencies, starts, table, words, at, out, i):  # type: ignore[no-untyped-def]
    """Decode one symbol; the next word is read in any case and used where the state has run low: no branch."""
    slot = x & np.uint32((1 << PRECISION) - 1)
    s = table[c, slot]
    out[i] = s
    x = np.uint32(
        np.uint32(frequencies[c, s]) * np.uint32(x >> np.uint32(PRECISION)) + np.uint32(slot - np.uint32(starts[c, s]))
    )
    low = x < np.uint32(1 << 16)
    x = np.uint32(np.uint32(x << np.uint32(16)) | np.uint32(words[at])) if low else x
    return x, at + np.int64(low)


@numba.njit(
    "int64(uint16[::1], uint8[::1], uint16[:, ::1], uint16[:, ::1], uint8[:, ::1], uint8[::1])",
    nogil=True,
    cache=True,
    boundscheck=False,
)
def decode(words, contexts, frequencies, starts, table, out):  # type: ignore[no-untyped-def]
    """Decode `out.size` symbols. Returns the number of words read, or −1 where the words do not fit the model."""
    if words.size < 2 * STATES:
        return -1
    x0 = np.uint32(words[0]) | (np.uint32(words[1]) << np.uint32(16))
    x1 = np.uint32(words[2]) | (np.uint32(words[3]) << np.uint32(16))
    x2 = np.uint32(words[4]) | (np.uint32(words[5]) << np.uint32(16))
    x3 = np.uint32(words[6]) | (np.uint32(words[7]) << np.uint32(16))
    at = 2 * STATES
    last = words.size
    size = out.size
    whole = size & ~3
    for i in range(0, whole, 4):
        if at + 4 > last:
            break_at = i
            break
        x0, at = _step(x0, contexts[i], frequencies, starts, table, words, at, out, i)
        x1, at = _step(x1, contexts[i + 1], frequencies, starts, table, words, at, out, i + 1)
        x2, at = _step(x2, contexts[i + 2], frequencies, starts, table, words, at, out, i + 2)
        x3, at = _step(x3, contexts[i + 3], frequencies, starts, table, words, at, out, i + 3)
    else:
        break_at = whole
    # The last words, one check a symbol; a padded copy keeps the reads inside.
    rest = np.zeros(last - at + 1, np.uint16)
    rest[: last - at] = words[at:]
    used = 0
    for i in range(break_at, size):
        lane = i & 3
        x = x0 if lane == 0 else x1 if lane == 1 else x2 if lane == 2 else x3
        x, used = _step(x, contexts[i], frequencies, starts, table, rest, used, out, i)
        if used >= rest.size:
            return -1
        if lane == 0:
            x0 = x
        elif lane == 1:
            x1 = x
        elif lane == 2:
            x2 = x
        else:
            x3 = x
    return at + used
