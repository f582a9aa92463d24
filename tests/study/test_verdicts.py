"""Verdicts on made-up numbers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltalens.study.verdicts import CONTRADICTED, EXPLAINED, NOT_HERE, NOT_RUN, REPRODUCED, interval, judge, paired

SEEN = {"0": 0.32, "1": 0.31, "2": 0.33}
CHANCE = {"0": 0.10, "1": 0.10, "2": 0.10}


def test_interval_is_the_t_interval() -> None:
    over = interval([1.0, 2.0, 3.0])
    assert over.mean == 2.0
    assert over.high - over.mean == pytest.approx(4.302652729749464 / math.sqrt(3))  # t(0.975, 2) · s / √n, s = 1
    assert over.mean - over.low == pytest.approx(over.high - over.mean)


def test_interval_of_one_value() -> None:
    assert interval([0.5]).low == -math.inf
    assert interval([0.5], 0.1).high == pytest.approx(0.6)
    for nothing in ([], [math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="finite"):
            interval(nothing)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6), st.floats(-1e3, 1e3))
def test_interval_moves_with_its_values(values: list[float], shift: float) -> None:
    plain, moved = interval(values), interval([value + shift for value in values])
    assert plain.low <= plain.mean <= plain.high
    assert moved.low == pytest.approx(plain.low + shift, abs=1e-6, rel=1e-9)


@pytest.mark.parametrize(
    ("rule", "seen", "chance", "verdict"),
    [
        ("above", SEEN, CHANCE, REPRODUCED),
        ("below", SEEN, CHANCE, CONTRADICTED),
        ("above", CHANCE, SEEN, CONTRADICTED),
        ("below", CHANCE, SEEN, REPRODUCED),
        ("above", SEEN, 0.1, REPRODUCED),
        ("above", {"0": 0.3, "1": 0.0}, 0.1, NOT_HERE),  # the interval of two far apart is wide
        ("above", {"0": 0.3}, CHANCE, NOT_HERE),  # one seed, no spread
        ("above", {"0": 0.2, "1": 0.2}, 0.1, REPRODUCED),  # no variance at all
        ("above", {"0": 0.1, "1": 0.1}, 0.1, NOT_HERE),  # no effect at all
    ],
)
def test_beside_chance(rule: str, seen: dict[str, float], chance: dict[str, float] | float, verdict: str) -> None:
    assert judge(rule, seen, chance).verdict == verdict  # type: ignore[arg-type]


def test_margin_and_spread() -> None:
    assert judge("above", {"0": 0.3}, 0.1, spread=0.05).verdict == REPRODUCED
    assert judge("above", {"0": 0.3}, 0.1, spread=0.05, margin=0.16).verdict == NOT_HERE
    assert judge("above", {"0": 0.3}, 0.1, spread=0.25).verdict == NOT_HERE
    assert judge("below", {"0": 0.3}, 0.1, spread=0.05, margin=0.1).verdict == CONTRADICTED
    assert judge("below", {"0": 0.3}, 0.1, spread=0.05, margin=0.3).verdict == NOT_HERE  # too little to count


def test_null_that_gives_all_of_it_explains_it() -> None:
    found = judge("above", SEEN, CHANCE, {name: value - 0.002 for name, value in SEEN.items()})
    assert found.verdict == EXPLAINED
    assert found.explained == pytest.approx(1 - 0.002 / 0.22)
    assert judge("below", {"0": 0.047, "1": 0.048}, 0.1, {"0": 0.048, "1": 0.049}).verdict == EXPLAINED


def test_null_that_gives_more_than_all_explains_it() -> None:
    found = judge("above", SEEN, CHANCE, {"0": 0.4, "1": 0.4, "2": 0.4})
    assert found.verdict == EXPLAINED
    assert found.explained is not None
    assert found.explained > 1


def test_null_that_gives_half_leaves_it_reproduced() -> None:
    found = judge("above", SEEN, CHANCE, {name: value - 0.11 for name, value in SEEN.items()})
    assert found.verdict == REPRODUCED
    assert found.explained == pytest.approx(0.5)


def test_null_too_noisy_to_tell() -> None:
    found = judge("above", SEEN, CHANCE, {"0": 0.31, "1": 0.15, "2": 0.25})
    assert found.verdict == NOT_HERE
    assert "cannot be told" in found.why


def test_null_is_no_excuse_for_what_is_not_there() -> None:
    assert judge("above", CHANCE, SEEN, CHANCE).verdict == CONTRADICTED


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        ({"0": 0.80, "1": 0.81, "2": 0.79}, REPRODUCED),
        ({"0": 0.50, "1": 0.51, "2": 0.49}, CONTRADICTED),
        ({"0": 0.99, "1": 0.98, "2": 0.99}, CONTRADICTED),  # better is not the same either
        ({"0": 0.60, "1": 0.95, "2": 0.80}, NOT_HERE),
        ({"0": 0.80}, NOT_HERE),
    ],
)
def test_same(seen: dict[str, float], verdict: str) -> None:
    assert judge("same", seen, 0.8, margin=0.05).verdict == verdict


def test_missing_runs_are_said() -> None:
    for seen, chance, null, name in (
        ({}, CHANCE, None, "seen"),
        (SEEN, {}, None, "chance"),
        (SEEN, CHANCE, {}, "control"),
    ):
        found = judge("above", seen, chance, null)
        assert found.verdict == NOT_RUN
        assert name in found.why


def test_seeds_are_paired() -> None:
    assert paired({"0": 1.0, "1": 2.0}, {"1": 0.5, "2": 9.0}) == {"1": 1.5}
    assert paired({"0": 1.0, "1": 2.0}, {"1": 0.5}) == {"0": 0.5, "1": 1.5}  # one run for all
    assert paired({"0": 1.0}, {"1": 1.0, "2": 3.0}) == {"0": -1.0}  # nothing shared: the mean
    assert paired({"0": 1.0}, 0.25) == {"0": 0.75}
