"""Tasks: what a model is asked, what its teacher may see, and when a reply counts as right.

Plain Python without torch, so that the command line can name the tasks without loading a model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from deltalens.errors import ConfigError

__all__ = ["TASKS", "Example", "Sums", "Task", "get_task"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question.

    Attributes:
        prompt: the user's message, all that the student sees.
        context: what a privileged teacher sees directly after the prompt, leading space included.
        answer: the right answer, for the scorer.
    """

    prompt: str
    context: str
    answer: str


class Task(Protocol):
    """What training and evaluation ask of a task."""

    @property
    def name(self) -> str:
        """The task's name on the command line."""
        ...

    def train(self, count: int, seed: int = 0) -> list[Example]:
        """`count` training examples, the same for the same seed."""
        ...

    def test(self, count: int) -> list[Example]:
        """The first `count` held-out examples, the same in every run."""
        ...

    def score(self, reply: str, example: Example) -> bool:
        """Whether a reply counts as right."""
        ...


# The split belongs to the task and not to the run: no seed of a run may move a pair from one side to the other,
# or a model trained under one seed would be evaluated on its own training data under another.
_SPLIT_SEED = "sums"


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Two-digit sums, "What is 42 + 87? Reply with the number only.".

    The split is by unordered pair: a + b and b + a are always on the same side.

    Attributes:
        held_out: number of unordered pairs of 4095 that only `test` uses.
    """

    held_out: int = 500
    name: str = "sums"

    def __post_init__(self) -> None:
        pairs = 90 * 91 // 2
        if not 0 < self.held_out < pairs:
            raise ConfigError(f"sums: held_out must be between 1 and {pairs - 1}, not {self.held_out}")

    def train(self, count: int, seed: int = 0) -> list[Example]:
        """`count` examples: every ordered training pair once in shuffled order, then all again."""
        pairs = self._pairs()[self.held_out :]
        ordered = sorted({order for a, b in pairs for order in ((a, b), (b, a))})
        rng = random.Random(seed)
        examples: list[Example] = []
        while len(examples) < count:
            rng.shuffle(ordered)
            examples += [_sum(a, b) for a, b in islice(ordered, count - len(examples))]
        return examples

    def test(self, count: int) -> list[Example]:
        """The first `count` held-out pairs, each in one fixed order.

        Raises:
            ConfigError: more are asked for than are held out.
        """
        if count > self.held_out:
            raise ConfigError(f"sums: only {self.held_out} pairs are held out, {count} were asked for")
        return [_sum(a, b) for a, b in self._pairs()[:count]]

    def score(self, reply: str, example: Example) -> bool:
        """Whether the last integer in the reply is the sum ("42 + 87 = 129." counts, "1 hundred" does not)."""
        numbers = re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d{3})", "", reply))
        return bool(numbers) and numbers[-1] == example.answer

    @staticmethod
    def _pairs() -> list[tuple[int, int]]:
        """All unordered pairs in the order that defines the split, each with its two numbers in a fixed order."""
        rng = random.Random(_SPLIT_SEED)
        pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
        rng.shuffle(pairs)
        return [(a, b) if rng.random() < 0.5 else (b, a) for a, b in pairs]


def _sum(a: int, b: int) -> Example:
    return Example(
        prompt=f"What is {a} + {b}? Reply with the number only.",
        context=f" (The correct answer is {a + b}.)",
        answer=str(a + b),
    )


TASKS: dict[str, Callable[[], Task]] = {"sums": Sums}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}; there is: {', '.join(sorted(TASKS))}")
    return TASKS[name]()
