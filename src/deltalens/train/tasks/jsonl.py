"""A task from a file of one JSON object a line."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deltalens.errors import ConfigError
from deltalens.train.tasks.base import Example, passes
from deltalens.train.tasks.math import same_value

__all__ = ["JSONLines"]

_SCORERS = ("exact", "number", "math")
_HELD_OUT = 500


@dataclass(frozen=True)
class JSONLines:
    """Questions from a file. Columns:

    - `prompt` (text) and `answer` (text or number): required;
    - `context` (text): what a privileged teacher sees after the prompt; by default the answer;
    - `image` (a path) or `images` (a list of paths), relative to the file's folder;
    - `split`: `train` or `test`, on all lines or on none. Without it a fixed fifth of the questions, at most 500, is
      held out; lines with the same prompt and images fall on one side.

    Attributes:
        path: the file.
        scorer: `exact`: the reply equals the answer but for case, spacing and a final full stop; `number`: the last
            number in the reply equals the answer's; `math`: math-verify finds them equal.

    Raises:
        ConfigError: there is no such file or scorer; reading: a line is not JSON or lacks a column.
    """

    path: Path
    scorer: str = "exact"

    @classmethod
    def named(cls, argument: str) -> JSONLines:
        """The task `jsonl:PATH` or `jsonl:PATH?score=SCORER`, from what follows the colon."""
        path, question, option = argument.partition("?")
        if Path(argument).is_file() or not question:
            return cls(Path(argument).expanduser())
        key, _, scorer = option.partition("=")
        if key != "score":
            raise ConfigError(f"jsonl:{argument}: unknown option {key!r}; there is: score={'|'.join(_SCORERS)}")
        return cls(Path(path).expanduser(), scorer)

    def __post_init__(self) -> None:
        if self.scorer not in _SCORERS:
            raise ConfigError(f"jsonl:{self.path}: no scorer {self.scorer!r}; there is: {', '.join(_SCORERS)}")
        if not self.path.is_file():
            raise ConfigError(f"{self.path}: there is no such file of examples")

    @property
    def name(self) -> str:
        return f"jsonl:{self.path}" + ("" if self.scorer == "exact" else f"?score={self.scorer}")

    @property
    def reply_tokens(self) -> int:
        return 512 if self.scorer == "math" else 64

    def train(self, count: int, seed: int = 0) -> list[Example]:
        """`count` training examples: all in shuffled order, then all again.

        Raises:
            ConfigError: a line cannot be used, or nothing is left to train on.
        """
        training, held = self._splits
        if not training:
            raise ConfigError(f"{self.path}: has nothing to train on beside {len(held)} held-out examples")
        return passes(training, count, seed)

    def test(self, count: int) -> list[Example]:
        """The first `count` held-out examples.

        Raises:
            ConfigError: a line cannot be used, or more are asked for than are held out.
        """
        held = self._splits[1]
        if count > len(held):
            raise ConfigError(f"{self.path}: only {len(held)} examples are held out, {count} were asked for")
        return held[:count]

    def score(self, reply: str, example: Example) -> bool:
        """Whether the reply is right by the chosen scorer."""
        if self.scorer == "math":
            return same_value(reply, example.answer)
        if self.scorer == "number":
            return _last_number(reply) is not None and _last_number(reply) == _last_number(example.answer)
        return _normal(reply) == _normal(example.answer)

    @cached_property
    def _splits(self) -> tuple[list[Example], list[Example]]:
        sides: dict[str | None, list[Example]] = {"train": [], "test": [], None: []}
        with self.path.open(encoding="utf-8-sig") as stream:
            try:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        side, example = self._parse(line, f"{self.path}, line {number}")
                        sides[side].append(example)
            except UnicodeDecodeError:
                raise ConfigError(f"{self.path}: is not UTF-8 text") from None
        if sides[None] and (sides["train"] or sides["test"]):
            raise ConfigError(f"{self.path}: some lines have a split and {len(sides[None])} have none")
        if sides["train"] or sides["test"]:
            held = {(example.prompt, example.images) for example in sides["test"]}
            return [e for e in sides["train"] if (e.prompt, e.images) not in held], sides["test"]
        questions = list(dict.fromkeys((example.prompt, example.images) for example in sides[None]))
        random.Random("jsonl").shuffle(questions)
        chosen = set(questions[: min(_HELD_OUT, len(questions) // 5)])
        held_out = [e for e in sides[None] if (e.prompt, e.images) in chosen]
        return [e for e in sides[None] if (e.prompt, e.images) not in chosen], held_out

    def _parse(self, line: str, place: str) -> tuple[str | None, Example]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{place}: is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{place}: is not a JSON object with prompt and answer")
        for column in ("prompt", "answer"):
            if column not in row:
                raise ConfigError(f"{place}: has no {column!r}; it has {', '.join(map(repr, row)) or 'nothing'}")
        answer = row["answer"]
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise ConfigError(f"{place}: the answer must be text or a number, not {json.dumps(answer)[:40]}")
        context = row.get("context")
        context = f" (The correct answer is {answer}.)" if context is None else context
        for column, value in (("prompt", row["prompt"]), ("context", context)):
            if not isinstance(value, str):
                raise ConfigError(f"{place}: {column} must be text, not {json.dumps(value)[:40]}")
        if row.get("split") not in (None, "train", "test"):
            raise ConfigError(f"{place}: split must be train or test, not {json.dumps(row['split'])[:40]}")
        if context and not context[0].isspace():
            context = f" {context}"
        images = self._images(row, place)
        return row.get("split"), Example(prompt=row["prompt"], context=context, answer=str(answer), images=images)

    def _images(self, row: dict[str, Any], place: str) -> tuple[str, ...]:
        listed = row.get("images") if row.get("image") is None else [row["image"]]
        listed = [] if listed is None else listed
        if not isinstance(listed, list) or not all(isinstance(image, str) for image in listed):
            raise ConfigError(f"{place}: image must be a path, and images a list of paths")
        paths = [self.path.parent / image for image in listed]
        for path in paths:
            if not path.is_file():
                raise ConfigError(f"{place}: there is no image {path}")
        return tuple(map(str, paths))


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


def _last_number(text: str) -> float | None:
    numbers = re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text))
    return float(numbers[-1]) if numbers else None
