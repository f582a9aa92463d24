"""Tasks: the split leaks nothing, and the scorer accepts what it says it accepts."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalens.errors import ConfigError
from deltalens.train.tasks import Example, Sums, get_task

two_digits = st.integers(10, 99)


def pair(example: Example) -> frozenset[int]:
    a, b = map(int, re.findall(r"\d+", example.prompt))
    assert int(example.answer) == a + b
    return frozenset((a, b))


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 9000), held_out=st.integers(1, 4000))
def test_no_pair_is_on_both_sides_in_any_order(seed: int, count: int, held_out: int) -> None:
    task = Sums(held_out=held_out)
    held = {pair(example) for example in task.test(held_out)}
    trained = {pair(example) for example in task.train(count, seed)}
    assert len(held) == held_out
    assert not held & trained


def test_one_pass_shows_every_training_pair_in_both_orders_once() -> None:
    task = Sums(held_out=95)
    doubles_held = sum(len(pair(example)) == 1 for example in task.test(95))
    full = 2 * (4095 - 95) - (90 - doubles_held)
    prompts = [example.prompt for example in task.train(full)]
    assert len(set(prompts)) == full


def test_the_split_is_the_same_whatever_the_seed_and_the_training_order_is_not() -> None:
    assert Sums().test(7) == Sums().test(500)[:7]
    assert Sums().train(50, seed=1) == Sums().train(50, seed=1)
    assert Sums().train(50, seed=1) != Sums().train(50, seed=2)


@given(a=two_digits, b=two_digits, wrong=st.integers(10, 250))
def test_last_integer_decides(a: int, b: int, wrong: int) -> None:
    example = Example(prompt="", context="", answer=str(a + b))
    score = Sums().score
    for reply in (f"{a + b}", f"{a} + {b} = {a + b}.", f"**{a + b}**", f"The answer is {a + b}, of course!"):
        assert score(reply, example)
    assert score(f"{a + b} or {wrong}", example) == (wrong == a + b)


@pytest.mark.parametrize("reply", ["", "one hundred", "1290", "-1", "129 = 42 + 87", "129.0", "12 9"])
def test_wrong_replies(reply: str) -> None:
    assert not Sums().score(reply, Example(prompt="", context="", answer="129"))


def test_thousands_separator_is_part_of_a_number() -> None:
    assert Sums().score("1,129", Example(prompt="", context="", answer="1129"))
    assert not Sums().score("1,129", Example(prompt="", context="", answer="129"))


def test_errors_name_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'products'; there is: easy-vqa, .*sums"):
        get_task("products")
    with pytest.raises(ConfigError, match="only 500 pairs are held out"):
        Sums().test(501)
    with pytest.raises(ConfigError, match="between 1 and 4094"):
        Sums(held_out=4095)
