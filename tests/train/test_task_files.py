"""Tasks from data: mathematics datasets and JSON lines; what is wrong with a file is said with its line."""

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deltalens.errors import ConfigError
from deltalens.train.tasks import Example, JSONLines, Math, get_task, reply_limit
from deltalens.train.tasks.math import same_value


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
