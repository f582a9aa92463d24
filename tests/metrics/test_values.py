import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deltalens.metrics import values
from deltalens.metrics.values import ceil_share, delta_float64, prepare, round_threshold, round_to_bf16, to_float64

BF16 = np.dtype(ml_dtypes.bfloat16)
words = hnp.arrays(np.uint16, st.integers(0, 70), elements=st.integers(0, 65535))
single_bits = hnp.arrays(np.uint32, st.integers(0, 70), elements=st.integers(0, 2**32 - 1))


def as_bf16(array: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return array.astype(BF16)


def same_values(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal words, but for NaN, where only being NaN counts."""
    nan = np.isnan(theirs.astype(np.float64))
    np.testing.assert_array_equal(np.isnan(values.word_values(ours)), nan)
    np.testing.assert_array_equal(ours[~nan], theirs.view(np.uint16)[~nan])


@given(single_bits)
def test_float32_rounds_to_nearest_even_and_nan_stays_nan(bits):
    singles = bits.view(np.float32)
    same_values(round_to_bf16(singles), as_bf16(singles))


def test_rounding_at_ties_overflow_and_nan_with_a_small_payload():
    bits = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0x00008000], np.uint32)
    rounded = round_to_bf16(bits.view(np.float32))
    assert rounded[:3].tolist() == [0x3F80, 0x3F82, 0x7F80]
    assert np.isnan(values.word_values(rounded[3:6])).all()
    assert rounded[6] == 0


@pytest.mark.parametrize("dtype", ["F16", "F32", "F64"])
def test_prepare_casts_as_the_reference_library_does(dtype):
    rng = np.random.default_rng(0)
    stored = (rng.normal(size=500) * 10.0 ** rng.integers(-7, 4, 500)).astype(
        {"F16": "f2", "F32": "f4", "F64": "f8"}[dtype]
    )
    raw = stored.view(np.uint8)
    same_values(prepare(raw, dtype, "bf16"), as_bf16(stored.astype(np.float32)))
    np.testing.assert_array_equal(prepare(raw, dtype, "fp32"), stored.astype(np.float32))
    kept = prepare(raw, dtype, "stored")
    assert kept.dtype == (np.float64 if dtype == "F64" else np.float32)
    np.testing.assert_array_equal(kept, stored)


def test_prepare_bf16_is_a_view_and_survives_an_odd_offset():
    buffer = np.arange(33, dtype=np.uint8)
    raw = buffer[:32]
    assert np.shares_memory(prepare(raw, "BF16", "bf16"), raw)
    odd = prepare(buffer[1:], "BF16", "bf16")
    assert odd.flags.aligned
    np.testing.assert_array_equal(odd, np.frombuffer(buffer[1:].tobytes(), np.uint16))
    np.testing.assert_array_equal(prepare(raw, "BF16", "fp32"), raw.view(BF16).astype(np.float32).view(np.float32))


def test_float64_beyond_float32_becomes_infinite_without_a_warning():
    assert np.isinf(prepare(np.array([1e300]).view(np.uint8), "F64", "fp32"))


def test_thresholds_take_the_dtype_of_the_difference():
    assert round_threshold(1e-5, "bf16", "F32") == pytest.approx(1.00136e-5, rel=1e-5)
    assert round_threshold(1e-5, "fp32", "F64") == float(np.float32(1e-5))
    assert round_threshold(1e-5, "stored", "F64") == 1e-5
    assert round_threshold(1e-5, "stored", "BF16") == float(np.float32(1e-5))


@given(words, st.randoms(use_true_random=False))
def test_delta_of_words_is_bf16_subtraction(source, random):
    trained = source.copy()
    for i in range(source.size):
        trained[i] = random.choice([source[i], source[i] ^ 1, random.randrange(65536)])
    out = np.empty(source.size)
    delta_float64(source, trained, out)
    with np.errstate(all="ignore"):  # signalling NaNs
        expected = (trained.view(BF16) - source.view(BF16)).astype(np.float64)
        widened = source.view(BF16).astype(np.float64)
    np.testing.assert_array_equal(out, expected)
    to_float64(source, out)
    np.testing.assert_array_equal(out, widened)


def test_delta_of_floats_subtracts_in_their_own_dtype():
    source = np.array([1.0, 0.1, -3.0], np.float32)
    trained = np.array([1.0000001, 0.3, 4.0], np.float32)
    out = np.empty(3)
    delta_float64(source, trained, out)
    np.testing.assert_array_equal(out, (trained - source).astype(np.float64))
    delta_float64(source.astype(np.float64), trained.astype(np.float64), out)
    np.testing.assert_array_equal(out, trained.astype(np.float64) - source)
    delta_float64(source, trained.astype(np.float64), out)
    np.testing.assert_array_equal(out, trained.astype(np.float64) - source)
    to_float64(source, out)
    np.testing.assert_array_equal(out, source)


def test_kernels_take_read_only_input():
    source = np.frombuffer(np.arange(4, dtype=np.uint16).tobytes(), np.uint16)
    assert not source.flags.writeable
    out = np.empty(4)
    delta_float64(source, source, out)
    assert not out.any()


def test_shares_are_read_as_decimals():
    assert ceil_share(0.1, 30) == 3
    assert ceil_share(0.1, 31) == 4
    assert ceil_share(0.001, 1) == 1
    assert ceil_share(0.0, 5) == 0
