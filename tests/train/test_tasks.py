"""Tasks: the split leaks nothing, and the scorer accepts what it says it accepts."""

import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deltalens.errors import ConfigError
from deltalens.train.tasks import (
    EasyVQA,
    Example,
    ReasoningGym,
    Sums,
    get_task,
    messages,
    passes,
    to_dataset,
)

two_digits = st.integers(10, 99)


def pair(example: Example) -> frozenset[int]:
    a, b = map(int, re.findall(r"\d+", example.prompt))
    assert int(example.answer) == a + b
    return frozenset((a, b))


@settings(max_examples=15, deadline=None)
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


@settings(deadline=None)
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


def test_errors_name_what_there_is(tmp_path: Path) -> None:
    for name, text in (
        ("products", "unknown task 'products'; there is: easy-vqa, jsonl:PATH, math:HUB_ID, reasoning-gym:NAME, sums"),
        ("easy_vqa", r"unknown task 'easy_vqa' \(did you mean easy-vqa\?\)"),
        ("sum", r"did you mean sums\?"),
        ("math", "say which, as math:HUB_ID"),
        ("sums:3", "sums takes no argument"),
        ("reasoning-gym:chain_sums", "no task 'chain_sums' among its .*; near: chain_sum"),
        (f"jsonl:{tmp_path / 'absent'}", "absent: there is no such file"),
    ):
        with pytest.raises(ConfigError, match=text) as caught:
            get_task(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="only 500 pairs are held out"):
        Sums().test(501)
    with pytest.raises(ConfigError, match="between 1 and 4094"):
        Sums(held_out=4095)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("reasoning-gym:chain_sum", "reasoning_gym", "reasoning-gym"),
        ("easy-vqa", "easy_vqa", "vision"),
        ("math:org/absent", "math_verify", "math"),
    ],
)
def test_a_missing_package_is_one_line_that_says_what_to_install(
    name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=re.escape(f"pip install 'deltalens[{extra}]'")):
        get_task(name).test(1)


@settings(deadline=None)
@given(items=st.lists(st.integers(), min_size=1, max_size=9, unique=True), count=st.integers(0, 40), seed=st.integers())
def test_passes_show_everything_equally_often(items: list[int], count: int, seed: int) -> None:
    drawn = passes(items, count, seed)
    assert len(drawn) == count
    assert drawn == passes(items, count, seed)
    for start in range(0, count - len(items) + 1, len(items)):
        assert sorted(drawn[start : start + len(items)]) == sorted(items)


def test_messages() -> None:
    plain = Example(prompt="a?", context=" (b)", answer="b")
    assert messages(plain) == [{"role": "user", "content": "a?"}]
    assert messages(plain, privileged=True) == [{"role": "user", "content": "a? (b)"}]
    image = Image.new("RGB", (2, 2))
    (message,) = messages(Example(prompt="a?", context="", answer="b", images=("x.png", image)))
    assert [part["type"] for part in message["content"]] == ["image", "image", "text"]
    assert [part.get("image") for part in message["content"]] == ["x.png", image, None]
    assert message["content"][-1]["text"] == "a?"


def test_dataset_rows(tmp_path: Path) -> None:
    examples = Sums().train(3)
    rows = to_dataset(examples)
    assert rows.column_names == ["prompt", "answer", "privileged_context"]
    assert rows[1]["prompt"] == messages(examples[1])
    assert (rows[2]["answer"], rows[2]["privileged_context"]) == (examples[2].answer, examples[2].context)
    blue = Image.new("RGB", (3, 2), (0, 0, 255))
    blue.save(tmp_path / "blue.png")
    shown: list[tuple[Any, ...]] = [(str(tmp_path / "blue.png"),), (blue, blue), ()]
    rows = to_dataset([Example(prompt="a", context="", answer="b", images=images) for images in shown])
    assert [[image.getpixel((0, 0)) for image in row["images"]] for row in rows] == [
        [(0, 0, 255)] * len(images) for images in shown
    ]


# reasoning-gym


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**40), name=st.sampled_from(["chain_sum", "spell_backward", "leg_counting"]))
def test_reasoning_gym_trains_on_nothing_that_it_tests(seed: int, name: str) -> None:
    task = ReasoningGym(name, held_out=30)
    held, trained = task.test(30), task.train(60, seed)
    assert not {e.prompt for e in held} & {e.prompt for e in trained}
    assert len({e.prompt for e in trained}) == len(trained) == 60
    assert trained == task.train(60, seed) == ReasoningGym(name, held_out=30).train(60, seed)
    assert task.test(7) == held[:7]


@pytest.mark.parametrize("name", ["chain_sum", "syllogism", "countdown"])
def test_reasoning_gym_scores_with_the_tasks_own_scorer(name: str) -> None:
    task = get_task(f"reasoning-gym:{name}")
    for example in task.test(5):
        assert task.score(example.answer, example)
        assert task.score(f"Thinking <answer>no</answer>, so <answer> {example.answer} </answer>.", example)
        assert not task.score("<answer>certainly not this</answer>", example)
        assert example.answer in example.context
    with pytest.raises(ConfigError, match="was not drawn here"):
        task.score("1", Example(prompt="another", context="", answer="1"))


class FewQuestions(list[dict[str, Any]]):
    """A generator of only three different questions, whatever its seed."""

    def __init__(self, size: int) -> None:
        super().__init__({"question": str(index % 3), "answer": "x", "metadata": {}} for index in range(size))


def test_reasoning_gym_tasks_of_few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReasoningGym, "_generator", lambda self, size, seed: FewQuestions(size))
    trained = ReasoningGym("chain_sum", held_out=1).train(10)
    assert sorted(Counter(e.prompt.splitlines()[0] for e in trained).items()) == [("1", 5), ("2", 5)]
    with pytest.raises(ConfigError, match="all of its 3 different questions are held out"):
        ReasoningGym("chain_sum", held_out=3).train(1)
    with pytest.raises(ConfigError, match="only 3 questions are held out"):
        ReasoningGym("chain_sum", held_out=3).test(4)


# easy-VQA


def test_easy_vqa_is_split_by_image_and_blind_answers_reach_two_thirds() -> None:
    task = EasyVQA()
    held, trained = task.test(9673), task.train(38575)
    pictures = {e.images for e in held}, {e.images for e in trained}
    assert (len(pictures[0]), len(pictures[1]), len(pictures[0] & pictures[1])) == (1000, 4000, 0)
    assert len({e.images for e in task.test(300)}) > 200, "the first questions are on many images"
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for e in trained:
        seen[e.prompt][e.answer] += 1
    blind = sum(seen[e.prompt].most_common(1)[0][0] == e.answer for e in held) / len(held)
    assert blind == pytest.approx(0.670, abs=5e-4)
    with Image.open(held[0].images[0]) as image:
        assert image.size == (64, 64)
    assert all(task.score(e.answer, e) for e in held)


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("Yes.", "yes", True),
        ("Yes, there is a circle", "yes", True),
        ("yes and no", "yes", False),
        ("The red shape is a circle.", "circle", True),
        ("The red shape is a circle.", "red", True),
        ("a circle or a triangle", "circle", False),
        ("eyes", "yes", False),
        ("", "no", False),
    ],
)
def test_easy_vqa_scorer(reply: str, answer: str, right: bool) -> None:
    assert EasyVQA().score(reply, Example(prompt="", context="", answer=answer)) is right
