"""Every count against a twin in plain NumPy that sorts and compares."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalens.metrics import coordinates as module
from deltalens.metrics.coordinates import (
    SPARSITY_THRESHOLDS,
    TOP_SHARES,
    low_magnitude_coverage,
    measure_coordinates,
)
from deltalens.metrics.values import ceil_share, round_threshold, round_to_bf16

BF16 = np.dtype(ml_dtypes.bfloat16)
RATIOS = (0.01, 0.1, 0.5)


def compare_of(array: np.ndarray) -> tuple[str, str]:
    return ("bf16", "BF16") if array.dtype == np.uint16 else ("stored", "F64" if array.dtype == np.float64 else "F32")


def floats(array: np.ndarray) -> np.ndarray:
    return array.view(BF16) if array.dtype == np.uint16 else array


def twin_coverage(weights, chosen, ratio):
    k = ceil_share(ratio, weights.size)
    edge = np.sort(weights)[k - 1]
    below, tied = weights < edge, weights == edge
    inside = below + tied * (k - below.sum()) / tied.sum()
    return inside[chosen].sum() / chosen.sum() if chosen.any() else None


def check(source: np.ndarray, trained: np.ndarray, tau: float = 1e-5) -> None:
    compare = compare_of(source)
    threshold = round_threshold(tau, *compare)
    c = measure_coordinates(source, trained, threshold=threshold, ratios=RATIOS)
    w, t = floats(source), floats(trained)
    delta = np.abs((t - w).astype(np.float64))
    w, t = np.abs(w.astype(np.float64)), np.abs(t.astype(np.float64))
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[source.itemsize]
    assert (c.size, c.nonfinite) == (source.size, 0)
    assert c.unchanged_bits == np.count_nonzero(source.view(bits) == trained.view(bits))
    assert c.unchanged == np.count_nonzero(delta == 0)
    assert c.nonzero == np.count_nonzero(delta)
    assert c.visible == np.count_nonzero(delta > threshold)
    assert c.relative_sparse == np.count_nonzero(delta <= 1e-3 * np.maximum(w, t))
    for key, at in SPARSITY_THRESHOLDS.items():
        assert c.sparsity_at[key] == np.count_nonzero(delta <= round_threshold(at, *compare)), key
    assert c.source_energy == pytest.approx(np.sum(w**2), rel=1e-12, abs=0)
    assert c.delta_energy == pytest.approx(np.sum(delta**2), rel=1e-12, abs=0)
    descending = np.sort(delta)[::-1]
    for key, share in TOP_SHARES.items():
        expected = np.sum(descending[: ceil_share(share, delta.size)] ** 2)
        assert c.top_energy[key] == pytest.approx(expected, rel=1e-12, abs=1e-70), key
    with np.errstate(over="ignore"):
        bins = (w.astype(np.float32).view(np.uint32) >> 16).astype(int)
    np.testing.assert_array_equal(c.words, np.unique(bins))
    counted = ((c.weights_by_word, bins >= 0), (c.visible_by_word, delta > threshold), (c.nonzero_by_word, delta > 0))
    for by_word, chosen in counted:
        np.testing.assert_array_equal(by_word, np.bincount(bins[chosen], minlength=32768)[c.words])
    for ratio in RATIOS:
        for ours, chosen in zip(low_magnitude_coverage(c, ratio), (delta > threshold, delta > 0), strict=True):
            expected = twin_coverage(w, chosen, ratio)
            assert ours is None if expected is None else ours == pytest.approx(expected, rel=1e-12)


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    return round_to_bf16(values) if dtype == "bf16" else values.astype(dtype)


@pytest.mark.parametrize("dtype", ["bf16", "f4", "f8"])
@pytest.mark.parametrize(("size", "step"), [(1, 1e-3), (2, 0.0), (1023, 1e-5), (4097, 1e-4), (20_000, 1.0)])
def test_counts_equal_the_sorting_twin(dtype, size, step):
    rng = np.random.default_rng(size)
    weights = (rng.normal(size=size) * 0.02).astype(np.float32)
    weights[rng.random(size) < 0.05] = 0.0
    moved = weights + step * rng.normal(size=size) * (rng.random(size) < 0.4)
    check(cast(weights, dtype), cast(moved, dtype))


@pytest.mark.parametrize("dtype", ["bf16", "f4", "f8"])
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, -0.0, 1e-5, -1e-5, 1.00136e-5, 0.5, 0.25, 1.0, 1e-38, 1e-40, 3e38, 1e-3]),
            st.sampled_from([0.0, 1e-5, -1e-5, 2e-5, 1e-4, 0.01, -1.0, 1e-40]),
            st.sampled_from([1.0, -1.0]),
        ),
        min_size=1,
        max_size=40,
    )
)
def test_counts_equal_the_twin_at_ties_zeros_and_subnormals(dtype, entries):
    source = np.array([w for w, _, _ in entries], np.float32)
    # The sign flip makes +0 against -0: values equal, bits not.
    trained = np.array([(w + d) * (s if d == 0 and w == 0 else 1.0) for w, d, s in entries], np.float32)
    check(cast(source, dtype), cast(trained, dtype))


def test_every_finite_word_moved_by_every_number_of_steps_that_a_table_or_a_gathering_counts():
    word, move = np.meshgrid(np.arange(1 << 16), np.arange(-10, 11))
    trained = word + move
    kept = ((word & 0x7FFF) < 0x7F80) & ((trained & 0x7FFF) < 0x7F80) & (trained >= 0) & (trained < 1 << 16)
    source, trained = word[kept].astype(np.uint16), trained[kept].astype(np.uint16)
    order = np.random.default_rng(0).permutation(source.size)
    for part in (order, order[:1000], order[:1]):  # again: what a pass leaves behind would be seen in the next
        check(source[part], trained[part])
    small = source[(source & 0x7FFF) < 0x7F00]  # twice the others is infinite
    check(small, small ^ np.uint16(0x8000))


@pytest.mark.parametrize("move", [1, -1, 7, -7, 8, -8])
def test_words_that_step_into_the_nonfinite_are_counted(move):
    source = np.arange(1 << 16)
    source, trained = source.astype(np.uint16), (source + move).astype(np.uint16)
    finite = [(side & 0x7FFF) < 0x7F80 for side in (source, trained)]
    c = measure_coordinates(source, trained, threshold=1e-5)
    assert c.nonfinite == np.count_nonzero(~(finite[0] & finite[1]))
    check(source[finite[0]], source[finite[0]])


def test_every_update_equal_in_float32():
    """A sign-like update puts all of |Δ| into one bin, where the k-th largest is tied with everything."""
    source = np.linspace(-1, 1, 1000, dtype=np.float64)
    check(source, source + 2.0**-20)
    check(np.zeros(1000, np.float32), np.full(1000, 1e-3, np.float32))
    check(np.zeros(1000, np.uint16), np.full(1000, 0x3A83, np.uint16))


def test_bits_are_those_stored_not_those_compared():
    source = np.array([1.0, 0.3, 0.2], np.float32)
    trained = np.array([1.0, 0.3000001, 0.4], np.float32)
    c = measure_coordinates(
        round_to_bf16(source),
        round_to_bf16(trained),
        threshold=0.0,
        stored=(source.view(np.uint8), trained.view(np.uint8)),
    )
    assert (c.unchanged, c.unchanged_bits) == (2, 1)
    half = source.astype(np.float16)
    c = measure_coordinates(
        source, half.astype(np.float32), threshold=0.0, stored=(source.view(np.uint8), half.view(np.uint8))
    )
    assert c.unchanged_bits == 0


@pytest.mark.parametrize("dtype", ["bf16", "f4", "f8"])
def test_nonfinite_on_either_side_is_counted_once_and_the_rest_is_undefined(dtype):
    source = np.array([1.0, np.nan, np.inf, 2.0, 3.0, np.nan], np.float32)
    trained = np.array([1.5, np.nan, 1.0, np.inf, np.nan, 4.0], np.float32)
    c = measure_coordinates(cast(source, dtype), cast(trained, dtype), threshold=1e-5, ratios=(0.1,))
    assert (c.size, c.nonfinite, c.unchanged_bits) == (6, 5, 1)
    assert c.visible == c.nonzero == c.delta_energy == 0
    assert low_magnitude_coverage(c, 0.1) == (None, None)


def test_no_update_has_no_coverage_and_an_empty_tensor_is_all_zero():
    words = np.arange(10, dtype=np.uint16)
    assert low_magnitude_coverage(measure_coordinates(words, words, threshold=0.0), 0.1) == (None, None)
    for dtype in ("bf16", "f4"):
        empty = cast(np.zeros(0, np.float32), dtype)
        c = measure_coordinates(empty, empty, threshold=0.0, ratios=(0.1,))
        assert (c.size, c.nonzero, c.delta_energy, dict(c.top_energy)) == (0, 0, 0.0, dict.fromkeys(TOP_SHARES, 0.0))
        assert low_magnitude_coverage(c, 0.1) == (None, None)


def test_counters_flush_between_chunks(monkeypatch):
    rng = np.random.default_rng(3)
    source = round_to_bf16(rng.normal(size=5000).astype(np.float32))
    trained = np.where(rng.random(5000) < 0.5, source, source ^ 3).astype(np.uint16)
    whole = measure_coordinates(source, trained, threshold=1e-5)
    monkeypatch.setattr(module, "_FLUSH", 700)
    parts = measure_coordinates(source, trained, threshold=1e-5)
    np.testing.assert_array_equal(whole.visible_by_word, parts.visible_by_word)
    assert (whole.nonzero, whole.delta_energy, whole.top_energy) == (
        parts.nonzero,
        parts.delta_energy,
        parts.top_energy,
    )


def test_read_only_input():
    words = np.frombuffer(np.arange(100, dtype=np.uint16).tobytes(), np.uint16)
    assert measure_coordinates(words, words, threshold=0.0).unchanged == 100
