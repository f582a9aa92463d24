"""Choosing entries by score against sorting; random draws against their distributions."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from deltalens.metrics.rounding_null import fit
from deltalens.metrics.values import round_to_bf16
from deltalens.subnetwork.draw import kth_largest, largest, rank_of, reconstruction, rounding_scores

tied = st.sampled_from([0.0, 0.5, 1.0, 2.0, 1e-30, float("inf")])


@settings(max_examples=100, deadline=None)
@given(scores=arrays(np.float32, st.integers(1, 40), elements=tied), data=st.data())
def test_the_largest_are_exactly_as_many_and_no_smaller_than_the_rest(scores: np.ndarray, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, scores.size))
    chosen = largest(scores, count, np.random.default_rng(0))
    assert chosen.sum() == count
    np.testing.assert_array_equal(np.sort(scores[chosen]), np.sort(scores)[scores.size - count :])


def test_ties_are_drawn_alike() -> None:
    scores = np.array([3.0, 1, 1, 1, 1, 0])
    draws = sum(largest(scores, 3, np.random.default_rng(seed)).astype(int) for seed in range(2000))
    assert draws[0] == 2000
    assert draws[5] == 0
    assert np.abs(draws[1:5] - 1000).max() < 5 * np.sqrt(500), "each of four tied is in half of the draws"


def test_scores_within_the_tolerance_count_as_tied() -> None:
    scores = np.array([1.0, 1 + 1e-12, 1 - 1e-12, 0.5])
    draws = sum(largest(scores, 1, np.random.default_rng(seed), 1e-9).astype(int) for seed in range(600))
    assert draws[:3].min() > 100
    assert draws[3] == 0


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.lists(tied | st.floats(0, 10, width=32), min_size=0, max_size=9), min_size=1, max_size=4),
    dtype=st.sampled_from([np.float32, np.float64]),
    data=st.data(),
)
def test_kth_largest_is_that_of_a_sort(parts: list[list[float]], dtype: type, data: st.DataObject) -> None:
    held = [np.array(part, dtype) for part in parts]
    everything = np.sort(np.concatenate(held))[::-1]
    if not everything.size:
        return
    count = data.draw(st.integers(1, everything.size))
    edge, above, ties = kth_largest(lambda: iter(held), count)
    assert edge == everything[count - 1]
    assert above == np.count_nonzero(everything > edge)
    assert ties == np.count_nonzero(everything == edge)


def test_a_rounding_draw_has_the_nulls_distribution_of_exponents() -> None:
    rng = np.random.default_rng(3)
    words = round_to_bf16(np.abs(rng.standard_normal(200_000) * 0.05).astype(np.float32))
    total = np.bincount(words, minlength=1 << 15)
    count = 20_000
    null = fit(total, count, 1e-5, "bf16")
    assert null is not None
    chosen = largest(rounding_scores(words, null, rng), count, rng)
    assert chosen.sum() == count
    exponent = words >> 7
    uniform = 0
    for value in np.unique(exponent):
        here = exponent == value
        p = null.table()[words[here]]
        sigma = np.sqrt((p * (1 - p)).sum()) + 1
        assert abs(int(chosen[here].sum()) - p.sum()) < 5 * sigma, value
        uniform += abs(here.sum() * count / words.size - p.sum()) > 5 * sigma
    assert uniform > 3, "a uniform draw would not pass this test"
    # Below the exponent nothing else of the update is left: the second half holds its share of the draw.
    p = null.table()[words[100_000:]]
    assert abs(int(chosen[100_000:].sum()) - p.sum()) < 5 * np.sqrt((p * (1 - p)).sum())


def test_weights_that_never_move_are_never_drawn() -> None:
    words = np.array([0x3F80] * 50 + [0x3000] * 50, np.uint16)  # 1 and 5e-10
    null = fit(np.bincount(words, minlength=1 << 15), 10, 0.0, "bf16")
    assert null is not None
    chosen = largest(rounding_scores(words, null, np.random.default_rng(0)), 10, np.random.default_rng(0))
    assert chosen[:50].sum() == 0


def test_reconstruction_is_that_of_the_singular_value_decomposition() -> None:
    rng = np.random.default_rng(0)
    for shape in ((12, 7), (7, 12), (9, 9), (1, 5)):
        matrix = rng.standard_normal(shape)
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        for k in (1, min(shape) // 2 or 1, min(shape)):
            wanted = np.abs((u[:, :k] * s[:k]) @ vt[:k])
            np.testing.assert_allclose(reconstruction(matrix, k), wanted, atol=1e-10)


def test_rank_of_a_ratio() -> None:
    assert [rank_of(r, (40, 30)) for r in (0.0, 0.1, 0.3, 0.99, 1.0)] == [1, 3, 9, 29, 30]
