"""The coder: any symbols under any contexts come back; frequencies are as they must be; damage never crashes."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deltalens.patch import rans

WHOLE = 1 << rans.PRECISION


def models(symbols: np.ndarray, contexts: np.ndarray, width: int) -> np.ndarray:
    counts = np.zeros((int(contexts.max(initial=0)) + 1, width), np.int64)
    np.add.at(counts, (contexts, symbols), 1)
    out = np.zeros(counts.shape, np.uint16)
    for c in range(counts.shape[0]):
        if counts[c].any():
            out[c] = rans.normalise(counts[c])
    return out


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**40) | st.integers(0, 3), min_size=1, max_size=64).filter(any))
@example([1])
@example([0, 2**40, 1])
@example([1] * 64)
@example([2**47 - 63, *[1] * 63])
def test_normalised_frequencies(counts):
    counts = np.array(counts, np.int64)
    frequencies = rans.normalise(counts)
    assert frequencies.dtype == np.uint16
    assert int(frequencies.sum(dtype=np.int64)) == WHOLE
    assert np.array_equal(frequencies > 0, counts > 0)
    # Close to what they stand for: rounding and the ones lent to rare symbols are all that separates them.
    assert np.all(np.abs(frequencies - counts * (WHOLE / counts.sum())) <= 64)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3000) | st.integers(0, 9), st.integers(1, 64), st.integers(1, 256), st.integers(0, 2**32))
@example(4, 1, 1, 0)
@example(5, 64, 256, 0)
def test_round_trip(size, width, contexts, seed):
    rng = np.random.default_rng(seed)
    skew = rng.integers(1, 4)
    symbols = (rng.random(size) ** skew * width).astype(np.uint8)
    place = (rng.random(size) ** skew * contexts).astype(np.uint8)
    frequencies = models(symbols, place, width)
    starts, table = rans.slot_table(frequencies)
    words = rans.encode(symbols, place, frequencies, starts)
    out = np.full(size, 255, np.uint8)
    assert rans.decode(words, place, frequencies, starts, table, out) == words.size
    assert np.array_equal(out, symbols)


def test_slot_table_is_the_models_inverse():
    frequencies = np.array([[WHOLE, 0, 0], [1, WHOLE - 2, 1], [0, 0, 0]], np.uint16)
    starts, table = rans.slot_table(frequencies)
    for c, row in enumerate(frequencies[:2]):
        assert np.array_equal(np.bincount(table[c], minlength=3), row)
        for symbol in np.flatnonzero(row):
            assert table[c, starts[c, symbol]] == symbol


def test_one_symbol_alone_costs_nothing():
    """Its frequency is 2¹⁴, the whole: only the four states are written."""
    symbols, contexts = np.full(10_001, 3, np.uint8), np.zeros(10_001, np.uint8)
    frequencies = models(symbols, contexts, 4)
    starts, table = rans.slot_table(frequencies)
    words = rans.encode(symbols, contexts, frequencies, starts)
    assert words.size == 2 * rans.STATES
    out = np.empty(symbols.size, np.uint8)
    assert rans.decode(words, contexts, frequencies, starts, table, out) == words.size
    assert np.array_equal(out, symbols)


def test_size_is_the_entropy():
    rng = np.random.default_rng(0)
    symbols = rng.geometric(0.4, 200_000).clip(max=30).astype(np.uint8)
    contexts = rng.integers(0, 7, symbols.size).astype(np.uint8)
    frequencies = models(symbols, contexts, 31)
    words = rans.encode(symbols, contexts, frequencies, rans.slot_table(frequencies)[0])
    p = np.bincount(symbols) / symbols.size
    bits = -symbols.size * np.sum(p[p > 0] * np.log2(p[p > 0]))
    assert 16 * words.size == pytest.approx(bits, rel=2e-3)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 400), st.integers(0, 2**32), st.data())
def test_cut_or_changed_words_never_crash(size, seed, data):
    """Cut words: −1, or another count than was written. Changed words: some answer, of the right length."""
    rng = np.random.default_rng(seed)
    symbols, contexts = rng.integers(0, 64, size, np.uint8), rng.integers(0, 5, size, np.uint8)
    frequencies = models(symbols, contexts, 64)
    starts, table = rans.slot_table(frequencies)
    words = rans.encode(symbols, contexts, frequencies, starts)
    out = np.empty(size, np.uint8)
    cut = data.draw(st.integers(0, words.size - 1))
    assert rans.decode(words[:cut].copy(), contexts, frequencies, starts, table, out) != words.size
    changed = words.copy()
    changed[data.draw(st.integers(0, words.size - 1))] ^= np.uint16(data.draw(st.integers(1, 65535)))
    assert rans.decode(changed, contexts, frequencies, starts, table, out) <= words.size
    assert (
        rans.decode(rng.integers(0, 65536, words.size).astype(np.uint16), contexts, frequencies, starts, table, out)
        <= words.size
    )
