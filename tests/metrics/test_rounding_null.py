"""The closed form against brute force: exact loops over the grid, and real roundings of simulated steps."""

import math

import ml_dtypes
import numpy as np
import pytest

from deltalens.metrics import rounding_null
from deltalens.metrics.coordinates import measure_coordinates
from deltalens.metrics.rounding_null import (
    expected_low_magnitude_coverage,
    fine_histogram,
    fit,
    fit_all,
)
from deltalens.metrics.values import round_threshold, round_to_bf16, word_values

BF16 = np.dtype(ml_dtypes.bfloat16)
TAU = round_threshold(1e-5, "bf16", "BF16")


def numbers_of(grid: str) -> np.ndarray:
    """Every finite number of a 16-bit grid, ascending, as float64."""
    dtype = BF16 if grid == "bf16" else np.dtype(np.float16)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        every = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float64)
    return np.unique(every[np.isfinite(every)])


def loop_probability(weight: float, on_grid: float, tau: float, scale: float, numbers: np.ndarray) -> float:
    """P(visible) by METRICS' words: find the two boundaries among the grid's numbers, one weight at a time."""
    last_up = np.searchsorted(numbers, on_grid + tau, side="right") - 1
    last_down = np.searchsorted(numbers, on_grid - tau, side="left")
    above = (numbers[last_up] + numbers[last_up + 1]) / 2
    below = (numbers[last_down] + numbers[last_down - 1]) / 2
    root = math.sqrt(2) * scale
    return 0.5 * math.erfc((above - weight) / root) + 0.5 * math.erfc((weight - below) / root)


def weights_with_corners(size: int, seed: int) -> np.ndarray:
    """bf16 words of Gaussian weights, with zero, powers of two and their neighbours, and words around τ."""
    rng = np.random.default_rng(seed)
    words = round_to_bf16((0.02 * rng.normal(size=size)).astype(np.float32))
    tau_word = int(round_to_bf16(np.array([1e-5], np.float32))[0])
    corners = [0, 0x3C00, 0x3C00 - 1, 0x3C00 + 1, 0x3A80, 0x3A80 - 1, tau_word, tau_word - 1, tau_word + 1, 0x3000]
    words[: len(corners)] = corners
    return words


def histogram(words: np.ndarray) -> np.ndarray:
    return np.bincount(words & 0x7FFF, minlength=32768)


@pytest.mark.parametrize("tau", [0.0, TAU])
@pytest.mark.parametrize("density", [1e-3, 0.1, 0.6, 0.999])
def test_closed_form_equals_the_loop_and_meets_the_density(tau, density):
    words = weights_with_corners(4000, 0)
    null = fit(histogram(words), density * words.size, tau, "bf16")
    numbers = numbers_of("bf16")
    weights = word_values(words & 0x7FFF).astype(np.float64)
    expected = [loop_probability(w, w, tau, null.scale, numbers) for w in weights]
    np.testing.assert_allclose(null.table()[words & 0x7FFF], expected, rtol=1e-9, atol=1e-300)
    assert np.mean(expected) == pytest.approx(density, rel=1e-10)
    assert not null.table()[histogram(words) == 0].any()


@pytest.mark.parametrize("tau", [0.0, TAU])
def test_real_roundings_of_gaussian_steps(tau):
    """bf16(w + s·N) of actual casts, 40,000 a word: each word's frequency within 5 standard errors of P."""
    words = np.concatenate([weights_with_corners(60, 1), np.array([0x3700, 0x3727, 0x3729, 0x37A8], np.uint16)])
    words &= 0x7FFF
    null = fit(histogram(words), 0.3 * words.size, tau, "bf16")
    rng = np.random.default_rng(2)
    draws = 40_000
    weights = word_values(words).astype(np.float64)
    steps = null.scale * rng.normal(size=(draws, words.size))
    rounded = (weights + steps).astype(BF16).astype(np.float64)
    frequency = (np.abs(rounded - weights) > tau).mean(axis=0)
    p = null.table()[words]
    error = np.sqrt(p * (1 - p) / draws)
    assert np.all(np.abs(frequency - p) <= 5 * error + 1e-4)
    # Δ itself rounded to bf16, as it is when measured: only words below 2τ can notice, and hardly.
    in_bf16 = (rounded.astype(BF16) - weights.astype(BF16)).astype(np.float64)
    assert np.all(np.abs((np.abs(in_bf16) > tau).mean(axis=0) - frequency) <= 0.01)


def test_power_of_two_has_half_the_spacing_below():
    words = np.full(10, 0x3F80, np.uint16)  # 1.0: 2⁻⁷ above, 2⁻⁸ below
    null = fit(histogram(words), 3, 0.0, "bf16")
    root = math.sqrt(2) * null.scale
    assert pytest.approx(0.5 * math.erfc(2**-8 / root) + 0.5 * math.erfc(2**-9 / root), rel=1e-10) == 0.3


@pytest.mark.parametrize("tau", [0.0, float(np.float32(1e-5))])
def test_binary16_grid(tau):
    rng = np.random.default_rng(4)
    weights = np.abs(0.02 * rng.normal(size=3000)).astype(np.float16)
    # The eight numbers of a word count alike, so hold all eight, of words with normal numbers.
    bits = np.unique(weights.astype(np.float32).view(np.uint32) >> 16)
    bits = bits[(bits << 16).view(np.float32) > 1e-4].astype(np.uint32)
    every = ((bits[:, None] << 16) + (np.arange(8, dtype=np.uint32) << 13)).view(np.float32).astype(np.float64)
    counts = np.zeros(32768, np.int64)
    counts[bits] = 8
    null = fit(counts, 0.2 * every.size, tau, "fp16")
    numbers = numbers_of("fp16")
    expected = [[loop_probability(w, w, tau, null.scale, numbers) for w in row] for row in every]
    np.testing.assert_allclose(null.table()[bits], np.mean(expected, axis=1), rtol=1e-9, atol=1e-300)


def test_float32_grid_against_real_roundings():
    rng = np.random.default_rng(5)
    weights = (0.02 * rng.normal(size=400_000)).astype(np.float32)
    tau = float(np.float32(1e-5))
    counts = np.bincount((np.abs(weights).view(np.uint32) >> 16).astype(int), minlength=32768)
    scale = 8e-6
    moved = (weights.astype(np.float64) + scale * rng.normal(size=weights.size)).astype(np.float32)
    null = fit(counts, np.count_nonzero(np.abs(moved - weights) > tau), tau, "fp32")
    assert null.scale == pytest.approx(scale, rel=5e-3)


@pytest.mark.parametrize("tau", [0.0, TAU])
def test_source_stored_finer_than_the_grid(tau):
    """float32 weights compared in bf16: a step counts from the stored weight, not from its rounded word."""
    rng = np.random.default_rng(6)
    weights = (0.02 * rng.normal(size=200_000)).astype(np.float32)
    words = round_to_bf16(weights)
    scale = 3e-5
    moved = round_to_bf16((weights.astype(np.float64) + scale * rng.normal(size=weights.size)).astype(np.float32))
    c = measure_coordinates(words, moved, threshold=tau)
    fine = fine_histogram(weights)
    assert fine.sum() == weights.size
    null = fit_all(c.words, c.weights_by_word, [(c.visible, tau, "bf16")], fine)[0]
    assert null.scale == pytest.approx(scale, rel=0.02)
    coarse = fit_all(c.words, c.weights_by_word, [(c.visible, tau, "bf16")])[0]
    assert abs(coarse.scale / scale - 1) > 0.1  # what ignoring it would cost


def test_fine_probability_equals_the_loop():
    words = np.array([0x3C00, 0x3C01, 0x3B7F, 0x3A90], np.uint32)
    bits = (words[:, None] << 16) - 0x8000 + (np.arange(16, dtype=np.uint32) << 12) + 0x800
    weights = bits.astype(np.uint32).view(np.float32)
    null = fit(np.bincount(words, minlength=32768) * 16, 20, TAU, "bf16", fine_histogram(weights.ravel()))
    numbers = numbers_of("bf16")
    for row, word in zip(weights.astype(np.float64), words, strict=True):
        grid = float(word_values(np.array([word]))[0])
        expected = np.mean([loop_probability(w, grid, TAU, null.scale, numbers) for w in row])
        assert null.table()[word] == pytest.approx(expected, rel=1e-9)


def test_no_null_at_density_zero_or_one():
    counts = np.bincount([0x3C00, 0x3C01], minlength=32768)
    assert fit(counts, 0, 0.0, "bf16") is None
    assert fit(counts, 2, 0.0, "bf16") is None
    assert fit(np.zeros(32768, np.int64), 0, 0.0, "bf16") is None


@pytest.mark.parametrize("density", [1e-9, 1e-6, 0.5, 1 - 1e-9])
def test_solver_reaches_extreme_densities(density):
    counts = np.zeros(32768, np.int64)
    counts[0x0000] = 1  # a zero weight moves at any scale
    counts[0x2000:0x4200] = 10_000_000
    size = int(counts.sum())
    null = fit(counts, density * size, 0.0, "bf16")
    assert null.table() @ counts == pytest.approx(density * size, rel=1e-10)


def test_coverage_counts_the_word_at_the_edge_by_the_share_that_fits():
    counts = np.zeros(32768, np.int64)
    counts[[0x3A00, 0x3B00, 0x3C00]] = [5, 10, 85]
    null = fit(counts, 30, 0.0, "bf16")
    p = null.table()
    total = p @ counts
    assert expected_low_magnitude_coverage(null, [0.1])[0] == pytest.approx(
        (5 * p[0x3A00] + 5 * p[0x3B00]) / total, rel=1e-12
    )
    assert expected_low_magnitude_coverage(null, [0.1, 1.0])[1] == pytest.approx(1.0)


def test_an_update_without_preference_has_excess_one():
    rng = np.random.default_rng(8)
    source = round_to_bf16((0.02 * rng.normal(size=300_000)).astype(np.float32))
    moved = round_to_bf16(word_values(source) + (4e-5 * rng.normal(size=source.size)).astype(np.float32))
    for tau in (0.0, TAU):
        c = measure_coordinates(source, moved, threshold=tau)
        null = fit_all(c.words, c.weights_by_word, [(c.visible, tau, "bf16")])[0]
        expected = expected_low_magnitude_coverage(null, [0.1])[0]
        # [F], [G] read such a coverage as a preference; all of it is the rounding's.
        assert expected > 0.2
        edge = np.sort(source & 0x7FFF)[30_000]
        observed = c.visible_by_word[c.words <= edge].sum() / c.visible
        assert observed == pytest.approx(expected, rel=0.03)


def test_distances_are_computed_once():
    rounding_null._classes.cache_clear()
    counts = np.bincount(weights_with_corners(100, 9) & 0x7FFF, minlength=32768)
    for count in (10, 20, 30):
        fit(counts, count, 0.0, "bf16")
    assert rounding_null._classes.cache_info().misses == 1
    assert rounding_null._classes("bf16", 0.0, False).plus.size < 1000
