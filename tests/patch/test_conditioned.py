"""The conditioned codec: every word and step, models as good as they claim, rows told apart where that pays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalens.errors import PatchError
from deltalens.patch import conditioned
from deltalens.patch.conditioned import BY_ROW, FINE, SYMMETRIC, decode, encode


def bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def entropy_bits(given: np.ndarray, key: np.ndarray) -> float:
    """Entropy of `key` given `given` (non-negative integers, below 2¹⁶ in `key`), times the number of words."""
    totals = []
    for values in (given.astype(np.int64), given.astype(np.int64) << 16 | key):
        counts = np.unique(values, return_counts=True)[1]
        totals.append(np.sum(counts * np.log2(counts)))
    return float(totals[0] - totals[1])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.floats(0, 1), st.integers(0, 2**32), st.sampled_from([7, 10]))
def test_round_trip_of_matrices(rows, columns, density, seed, shift):
    rng = np.random.default_rng(seed)
    before = bf16(rng.standard_normal(rows * columns) * 0.02)
    active = rng.random(rows) ** 4  # rows that move and rows that do not
    moved = rng.random((rows, columns)) < density * active[:, None]
    after = (before + moved.reshape(-1) * rng.integers(-40, 41, before.size)).astype(np.uint16)
    model, frame = encode(before, after, shift, columns)
    assert np.array_equal(decode(model, frame, before, shift, columns), after)


def test_all_65536_words_of_both_ends():
    """Every 16-bit source word with steps of every token, and every difference there is."""
    every = np.arange(1 << 16, dtype=np.uint16)
    for before, after in (
        (every, (every.astype(np.int32) * 40503 % 65536).astype(np.uint16)),
        (np.zeros_like(every), every),
        (every, every[::-1].copy()),
    ):
        for shift in (7, 10):
            for columns in (256, every.size):
                assert np.array_equal(decode(*encode(before, after, shift, columns), before, shift, columns), after)


@pytest.mark.parametrize(("scale", "most"), [(4e-5, 1.01), (1e-6, 1.06)])
def test_size_is_near_the_conditional_entropy(scale, most):
    """2²⁰ words whose change depends on the exponent, models included: a third and a hundredth of the words change."""
    rng = np.random.default_rng(2)
    values = bf16(rng.standard_normal(1 << 20) * 0.02)
    moved = (values.astype(np.uint32) << 16).view(np.float32) + (rng.standard_normal(values.size) * scale)
    rounded = moved.astype(np.float32).view(np.uint32).astype(np.uint64) + 0x8000 >> 16
    after = rounded.astype(np.uint16)
    model, frame = encode(values, after, 7, values.size)
    bits = entropy_bits((values >> 7) & 0xFF, (after - values).astype(np.uint16))
    assert len(model) + len(frame) <= most * bits / 8 + 24  # four states of four bytes
    assert np.array_equal(decode(model, frame, values, 7, values.size), after)


def test_steps_of_one_direction_have_a_model_that_says_so():
    before = bf16(np.random.default_rng(0).standard_normal(50_000) * 0.02)
    moved = np.random.default_rng(1).random(before.size) < 0.2
    sizes = {}
    for name, step in (("both", np.where(np.arange(before.size) & 1, 1, -1)), ("down", -1)):
        model, frame = encode(before, (before + moved * step).astype(np.uint16), 7, before.size)
        assert bool(model[0] & SYMMETRIC) == (name == "both")
        sizes[name] = len(frame)
    assert sizes["both"] - sizes["down"] > 0.9 * moved.sum() / 8  # the sign's bit is not paid for


def test_rows_are_told_apart_where_that_pays():
    """Half of the rows never move: the entropy that knows the classes of rows is reached, 3 bits a row included."""
    rng = np.random.default_rng(3)
    rows, columns = 800, 256
    before = bf16(rng.standard_normal(rows * columns) * 0.02)
    moved = rng.random((rows, columns)) < np.repeat([0.0, 0.6], rows // 2)[rng.permutation(rows)][:, None]
    after = (before + moved.reshape(-1) * rng.integers(-2, 3, before.size)).astype(np.uint16)
    apart = encode(before, after, 7, columns)
    alike = encode(before, after, 7, before.size)
    assert apart[0][0] & BY_ROW
    assert not alike[0][0] & BY_ROW
    assert np.array_equal(decode(*apart, before, 7, columns), after)
    row_moves = np.repeat(moved.any(axis=1), columns)
    known = entropy_bits(row_moves.astype(np.int64), (after - before).astype(np.uint16)) / 8 + rows * 3 / 8
    assert len(apart[1]) < 1.02 * known < 0.8 * len(alike[1])
    even = (before + (rng.random(before.size) < 0.3)).astype(np.uint16)
    assert not encode(before, even, 7, columns)[0][0] & BY_ROW


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.sampled_from([1, 8]), st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_groups_cover_the_exponents_and_never_cost_more_than_apart(exponents, classes, fine, symmetric, seed):
    rng = np.random.default_rng(seed)
    joint = np.zeros((classes * 256, 33), np.int64)
    for k in range(classes):
        for e in rng.permutation(256)[: exponents if k or classes == 1 else 0]:  # the first of several has no words
            joint[k * 256 + e] = rng.integers(0, 1000, 33) // rng.integers(1, 2000, 33)
    last, counts, bits = conditioned._merge(joint, fine, symmetric)
    ends = np.flatnonzero(last == 255)
    assert ends.size == classes
    assert ends[-1] == last.size - 1
    extra = sum(not joint[k * 256 : (k + 1) * 256].any() for k in range(classes))  # a class without words has a model
    assert counts.sum() == joint.sum() + extra
    apart = [conditioned._cost(row, fine, symmetric) for row in joint if row.any()]
    assert bits <= sum(apart) + extra * conditioned._cost(np.eye(1, 33, dtype=np.int64)[0], fine, symmetric) + 1e-6
    first = 0
    for group, end in enumerate(last):  # each group's counts are its exponents' sum
        k = int(np.searchsorted(ends, group))
        row = joint[k * 256 + first : k * 256 + end + 1].sum(axis=0)
        assert np.array_equal(row, counts[group]) or not joint[k * 256 : (k + 1) * 256].any()
        first = 0 if end == 255 else end + 1


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.booleans(), st.integers(0, 2**32))
def test_models_are_read_as_they_were_meant(exponents, fine, seed):
    """More exponents with words than there are groups, too: frequencies are near the counts, none that occurs is 0."""
    rng = np.random.default_rng(seed)
    joint = np.zeros((8 * 256, 64), np.int64)
    for e in rng.permutation(8 * 256)[:exponents]:
        joint[e, rng.integers(0, 64, 5)] = rng.integers(1, 10**6, 5)
    model, _ = conditioned._fit(joint, fine)
    assert bool(model[0] & FINE) == fine
    groups, frequencies = conditioned._read_model(model)
    assert groups.size == joint.shape[0]
    assert frequencies.shape[0] == int(groups.max()) + 1 <= 256
    assert np.all(frequencies.sum(axis=1, dtype=np.int64) == 1 << 14)
    assert np.all(frequencies[groups][joint > 0] > 0)
    with pytest.raises(PatchError):
        conditioned._read_model(model[:-1])


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_frames_cut_short_or_too_long_are_refused(cut):
    rng = np.random.default_rng(5)
    before = bf16(rng.standard_normal(6400) * 0.02)
    moved = (rng.random((100, 64)) < np.linspace(0, 1, 100)[:, None]).reshape(-1)
    after = (before + moved * rng.integers(-300, 300, before.size)).astype(np.uint16)
    model, frame = encode(before, after, 7, 64)
    with pytest.raises(PatchError):
        decode(model, frame[:-cut], before, 7, 64)
    with pytest.raises(PatchError):
        decode(model, frame + b"\0" * cut, before, 7, 64)
    with pytest.raises(PatchError):
        decode(model, b"", before, 7, 64)
