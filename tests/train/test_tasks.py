"""Tasks: the split leaks nothing, and the scorer accepts what it says it accepts."""

import json
import re
import sys
import threading
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
    JSONLines,
    Math,
    ReasoningGym,
    Sums,
    get_task,
    messages,
    passes,
    reply_limit,
    to_dataset,
)
from deltalens.train.tasks.math import same_value

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


# Mathematics


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("own_cache")
def test_math_from_a_folder_with_both_splits(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    question = {"question": "1 + 1?", "answer": "One and one.\n#### 2"}
    write(folder / "train.jsonl", [question, {"question": "2 + 2?", "answer": "Two twos.\n#### 4"}])
    write(folder / "test.jsonl", [question])
    task = get_task(f"math:{folder}")
    assert [e.answer for e in task.train(3)] == ["4"] * 3, "the held-out question is dropped from training"
    (held,) = task.test(1)
    assert held.prompt.startswith("1 + 1?")
    assert "One and one." in held.context
    assert task.score("So it is \\boxed{2}.", held)
    assert not task.score("So it is \\boxed{3}.", held)
    assert reply_limit(task) == 512
    with pytest.raises(ConfigError, match="only 1 questions are held out, 2"):
        task.test(2)


@pytest.mark.usefixtures("own_cache")
def test_math_from_a_file_is_split_by_question(tmp_path: Path) -> None:
    rows = [{"problem": f"{i % 20}?", "solution": f"It is $\\boxed{{{i % 20}}}$."} for i in range(40)]
    task = get_task(f"math:{write(tmp_path / 'all.jsonl', rows)}")
    held, trained = {e.prompt for e in task.test(4)}, {e.prompt for e in task.train(32)}
    assert (len(held), len(trained), len(held & trained)) == (4, 16, 0)
    assert all(task.score(f"\\boxed{{{e.prompt.split('?')[0]}}}", e) for e in task.test(4))


@pytest.mark.usefixtures("own_cache")
def test_math_datasets_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, rows, text in (
        ("a.jsonl", [{"text": "1?", "answer": "1"}], "no column question or problem or prompt; it has text, answer"),
        ("b.jsonl", [{"question": "1?", "result": "1"}], "no column answer or final_answer or solution"),
        ("c.txt", [], "is not one of .jsonl"),
    ):
        with pytest.raises(ConfigError, match=text):
            get_task(f"math:{write(tmp_path / name, rows)}").train(1)
    folder = tmp_path / "tested"
    folder.mkdir()
    write(folder / "test.jsonl", [{"question": "1?", "answer": "1"}])
    with pytest.raises(ConfigError, match="nothing to train on beside the 1 held-out"):
        get_task(f"math:{folder}").train(1)

    import datasets

    asked: list[Any] = []

    def unreachable(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    task = get_task("math:openai/gsm8k:main@abc123")
    assert task.name == "math:openai/gsm8k:main@abc123"
    with pytest.raises(ConfigError, match=r"math:openai/gsm8k:main@abc123: .* \(no route to host\)"):
        task.test(1)
    assert asked == [(("openai/gsm8k", "main"), {"revision": "abc123"})]
    assert Math.named("org/name@v1") == Math("org/name", revision="v1")


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("\\boxed{\\frac{1}{2}}", "0.5", True),
        ("First \\boxed{3}. No: \\boxed{4}", "4", True),
        ("The answer is 1,234.", "1234", True),
        ("$x = 7$", "7", True),
        ("\\boxed{2\\sqrt{3}}", "\\sqrt{12}", True),
        ("\\boxed{\\frac{1}{2}}", "$\\frac{2}{3}$", False),
        ("I do not know.", "7", False),
        ("", "7", False),
    ],
)
def test_values_are_compared_and_not_their_spelling(reply: str, answer: str, right: bool) -> None:
    assert same_value(reply, answer) is right
    # Trainers may score in another thread, where math-verify's alarm does not work.
    there: list[bool] = []
    thread = threading.Thread(target=lambda: there.append(same_value(reply, answer)))
    thread.start()
    thread.join()
    assert there == [right]


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


# JSON lines


def lines(path: Path, *texts: str) -> str:
    path.write_text("\n".join(texts) + "\n")
    return f"jsonl:{path}"


def test_jsonl_with_a_split_column(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "one.png")
    name = lines(
        tmp_path / "data.jsonl",
        json.dumps({"prompt": "a", "answer": "A", "context": "hint", "split": "train"}),
        json.dumps({"prompt": "b", "answer": 2, "image": "one.png", "split": "test"}),
        "",
        json.dumps({"prompt": "b", "answer": 2, "images": ["one.png"], "split": "train"}),
    )
    task = get_task(name)
    (train,) = task.train(1)
    assert (train.context, train.images) == (" hint", ())
    (test,) = task.test(1)
    assert (test.answer, test.context) == ("2", " (The correct answer is 2.)")
    assert test.images == (str(tmp_path / "one.png"),)
    assert {e.prompt for e in task.train(9)} == {"a"}, "a held-out question is dropped from training"


@given(count=st.integers(5, 60), copies=st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_jsonl_without_one_holds_out_a_fifth_of_the_questions(
    tmp_path_factory: pytest.TempPathFactory, count: int, copies: int
) -> None:
    texts = [json.dumps({"prompt": f"q{i}", "answer": "x"}) for i in range(count)] * copies
    task = get_task(lines(tmp_path_factory.mktemp("jsonl") / "data.jsonl", *texts))
    held, trained = task.test(count // 5 * copies), task.train((count - count // 5) * copies)
    assert not {e.prompt for e in held} & {e.prompt for e in trained}
    assert len({e.prompt for e in held}) == count // 5
    assert Counter(e.prompt for e in [*held, *trained]) == {f"q{i}": copies for i in range(count)}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{'prompt': 1}", "line 2: is not JSON"),
        ("[1]", "line 2: is not a JSON object"),
        ('{"answer": "x"}', "line 2: has no 'prompt'; it has 'answer'"),
        ('{"prompt": "x", "anser": "y"}', "line 2: has no 'answer'; it has 'prompt', 'anser'"),
        ('{"prompt": 3, "answer": "y"}', "line 2: prompt must be text"),
        ('{"prompt": "x", "answer": null}', "line 2: the answer must be text or a number, not null"),
        ('{"prompt": "x", "answer": "y", "context": 1}', "line 2: context must be text"),
        ('{"prompt": "x", "answer": "y", "image": "no.png"}', "line 2: there is no image .*no.png"),
        ('{"prompt": "x", "answer": "y", "images": "no.png"}', "line 2: image must be a path"),
        ('{"prompt": "x", "answer": "y", "split": "dev"}', "line 2: split must be train or test"),
        ('{"prompt": "x", "answer": "y", "split": "test"}', "some lines have a split and 1 have none"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path: Path, line: str, text: str) -> None:
    task = get_task(lines(tmp_path / "data.jsonl", '{"prompt": "a", "answer": "b"}', line))
    with pytest.raises(ConfigError, match=text) as caught:
        task.train(1)
    assert "data.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_jsonl_scorers(tmp_path: Path) -> None:
    name = lines(tmp_path / "data.jsonl", '{"prompt": "a", "answer": "b"}')
    cases = {
        "exact": [("  New  york. ", "new York", True), ("in New York", "new york", False), ("7.0", "7", False)],
        "number": [("It is 7.", "7", True), ("7.0", "7", True), ("1,007", "1007", True), ("none", "7", False)],
        "math": [("\\boxed{1/2}", "0.5", True), ("\\boxed{1/3}", "0.5", False)],
    }
    for scorer, rows in cases.items():
        task = get_task(f"{name}?score={scorer}")
        assert isinstance(task, JSONLines)
        assert get_task(task.name) == task
        for reply, answer, right in rows:
            assert task.score(reply, Example(prompt="", context="", answer=answer)) is right, (scorer, reply)
    with pytest.raises(ConfigError, match="no scorer 'fuzzy'; there is: exact, number, math"):
        get_task(f"{name}?score=fuzzy")
    with pytest.raises(ConfigError, match="unknown option 'scorer'"):
        get_task(f"{name}?scorer=math")
    with pytest.raises(ConfigError, match="only 0 examples are held out"):
        get_task(name).test(1)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(ConfigError, match="is not UTF-8"):
        get_task(f"jsonl:{tmp_path / 'latin.jsonl'}").train(1)
