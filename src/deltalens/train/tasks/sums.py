"""Two-digit sums: the task of the demo, without a package or a file."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from deltalens.errors import ConfigError
from deltalens.train.tasks.base import Example, passes

__all__ = ["Sums"]

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
        return [_sum(a, b) for a, b in passes(ordered, count, seed)]

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
