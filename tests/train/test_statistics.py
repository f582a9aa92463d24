"""Intervals against their definitions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltalens.train.statistics import mean_at_k, pass_at_k, wilson_interval


@given(trials=st.integers(1, 5000), data=st.data())
def test_wilson_ends_are_where_the_score_test_just_rejects(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    share = successes / trials
    low, high = wilson_interval(successes, trials, z=1.7)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(1.7 * math.sqrt(end * (1 - end) / trials), rel=1e-6)


def test_wilson_against_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@given(st.lists(st.integers(0, 1), min_size=2, max_size=100))
def test_one_attempt_gives_the_plain_interval(correct: list[int]) -> None:
    plain = (sum(correct) / len(correct), *wilson_interval(sum(correct), len(correct)))
    assert mean_at_k(correct, 1) == pytest.approx(plain)
    assert pass_at_k(correct, 1) == pytest.approx(plain)


@given(st.lists(st.integers(0, 1), min_size=2, max_size=100), st.integers(2, 16))
def test_copies_of_one_attempt_add_no_certainty(correct: list[int], k: int) -> None:
    assert mean_at_k([k * c for c in correct], k) == pytest.approx(mean_at_k(correct, 1))


def test_attempts_that_vary_only_within_problems_count_in_full() -> None:
    assert mean_at_k([2] * 50, 4) == pytest.approx((0.5, *wilson_interval(100, 200)))


@given(st.integers(2, 8), st.data())
def test_pass_is_at_least_mean(k: int, data: st.DataObject) -> None:
    correct = data.draw(st.lists(st.integers(0, k), min_size=1, max_size=50))
    assert pass_at_k(correct, k)[0] >= mean_at_k(correct, k)[0] - 1e-12
