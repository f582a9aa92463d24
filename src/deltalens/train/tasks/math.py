"""Mathematics datasets from the Hub or a local folder, scored by math-verify."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deltalens.errors import ConfigError
from deltalens.train.tasks.base import Example, passes

__all__ = ["Math", "same_value"]

_QUESTIONS = ("question", "problem", "prompt")
_ANSWERS = ("answer", "final_answer", "solution")
_INSTRUCTION = "\nPut the final answer in \\boxed{}."
_HELD_OUT = 500
_SECONDS = 5  # of one parse or comparison


@dataclass(frozen=True)
class Math:
    """A dataset of questions with one mathematical answer each, such as GSM8K or MATH.

    Training takes the split `train`; evaluation `test`, else `validation`, else (a dataset of one split) a fixed fifth
    of it, at most 500. A training question that is also held out is dropped.

    Attributes:
        dataset: Hub id, or a local folder or file that `datasets.load_dataset` reads.
        config: the dataset's configuration (`main` of `openai/gsm8k`), where it has several.
        revision: branch, tag or commit on the Hub.
    """

    dataset: str
    config: str | None = None
    revision: str | None = None

    reply_tokens = 512

    @classmethod
    def named(cls, argument: str) -> Math:
        """The task `math:ORG/NAME[:CONFIG][@REVISION]` or `math:PATH`, from what follows the first colon."""
        if Path(argument).expanduser().exists():
            return cls(dataset=argument)
        rest, _, revision = argument.partition("@")
        dataset, _, config = rest.partition(":")
        return cls(dataset=dataset, config=config or None, revision=revision or None)

    @property
    def name(self) -> str:
        config = f":{self.config}" if self.config else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"math:{self.dataset}{config}{revision}"

    def train(self, count: int, seed: int = 0) -> list[Example]:
        """`count` training questions: all in shuffled order, then all again.

        Raises:
            ConfigError: the dataset cannot be had, lacks a column, or has nothing to train on.
        """
        training, held = self._splits
        if not training:
            raise ConfigError(f"{self.name}: has nothing to train on beside the {len(held)} held-out questions")
        return passes(training, count, seed)

    def test(self, count: int) -> list[Example]:
        """The first `count` held-out questions.

        Raises:
            ConfigError: the dataset cannot be had or lacks a column, or more are asked for than are held out.
        """
        held = self._splits[1]
        if count > len(held):
            raise ConfigError(f"{self.name}: only {len(held)} questions are held out, {count} were asked for")
        return held[:count]

    def score(self, reply: str, example: Example) -> bool:
        """Whether the reply's last answer (boxed where there is one) has the value of the right one."""
        return same_value(reply, example.answer)

    @cached_property
    def _splits(self) -> tuple[list[Example], list[Example]]:
        _library()  # before anything is downloaded
        splits = self._load()
        for name in ("test", "validation"):
            if name in splits:
                held = self._examples(splits[name], name)
                questions = {example.prompt for example in held}
                rows = self._examples(splits["train"], "train") if "train" in splits else []
                return [example for example in rows if example.prompt not in questions], held
        (name,) = list(splits)[:1]
        unique = list({example.prompt: example for example in self._examples(splits[name], name)}.values())
        random.Random("math").shuffle(unique)
        size = min(_HELD_OUT, len(unique) // 5)
        return unique[size:], unique[:size]

    def _load(self) -> Any:
        from datasets import load_dataset

        local = Path(self.dataset).expanduser()
        try:
            if local.is_file():
                kind = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}[local.suffix]
                return load_dataset(kind, data_files=str(local))
            path = str(local) if local.is_dir() else self.dataset
            return load_dataset(path, self.config, revision=self.revision)
        except KeyError:
            raise ConfigError(f"{self.name}: {local.suffix} is not one of .jsonl, .json, .csv, .parquet") from None
        except Exception as error:  # datasets raises what its readers, the Hub and the network raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"{self.name}: the dataset cannot be had ({reason})") from None

    def _examples(self, rows: Any, split: str) -> list[Example]:
        columns = rows.column_names
        question = next((name for name in _QUESTIONS if name in columns), None)
        answer = next((name for name in _ANSWERS if name in columns), None)
        if question is None or answer is None:
            wanted = _QUESTIONS if question is None else _ANSWERS
            raise ConfigError(
                f"{self.name}: split {split} has no column {' or '.join(wanted)}; it has {', '.join(columns)}"
            )
        worked = "solution" if "solution" in columns else answer
        texts = zip(rows[question], rows[answer], rows[worked], strict=True)
        return [_example(str(asked), str(right), str(solution)) for asked, right, solution in texts]


def _example(question: str, answer: str, solution: str) -> Example:
    # GSM8K writes the reasoning, then "#### 42".
    final = answer.rpartition("####")[2].strip()
    if solution.strip() == final:
        context = f"\n(The correct answer is {final}.)"
    else:
        context = f"\n(A worked solution: {solution.strip()})"
    return Example(prompt=question + _INSTRUCTION, context=context, answer=final)


def same_value(reply: str, answer: str) -> bool:
    """Whether the last mathematical answer in a reply has the value of `answer`, by math-verify.

    Args:
        reply: any text; the last `\\boxed{}` counts, else the last expression.
        answer: a number, a LaTeX expression with or without dollars, or a solution with a box.

    Raises:
        ConfigError: math-verify is not installed.
    """
    math_verify = _library()
    # math-verify limits its time by SIGALRM, which only the main thread may use.
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    plain = "$" not in answer and "\\boxed" not in answer
    right = math_verify.parse(f"${answer}$" if plain else answer, parsing_timeout=seconds)
    # Of several boxes math-verify takes all; a reply that corrects itself means the last.
    box = reply.rfind("\\boxed")
    given = math_verify.parse(reply if box < 0 else f"${reply[box:]}$", parsing_timeout=seconds)
    return bool(math_verify.verify(right, given, timeout_seconds=seconds))


def _library() -> Any:
    try:
        import math_verify
    except ImportError:
        raise ConfigError(
            "math-verify is not installed, and scoring mathematics needs it: pip install 'deltalens[math]'"
        ) from None
    return math_verify
