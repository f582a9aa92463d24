"""Any task of reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760), with its own scorer."""

from __future__ import annotations

import difflib
import random
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from deltalens.errors import ConfigError
from deltalens.train.tasks.base import Example, passes

__all__ = ["ReasoningGym"]

# A dataset of seed s makes its item i from seed s + i. Training seeds start below 10^9, these above: apart for any
# number of examples that anyone trains on.
_TEST_SEED = 2_000_000_000
_TRAIN_SEEDS = 1_000_000_000
_INSTRUCTION = "\nGive the final answer between <answer> and </answer>."
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class ReasoningGym:
    """A procedural task of reasoning-gym at its default difficulty.

    Held-out questions come from seeds that training never draws, and a training question that reads like a held-out
    one is dropped.

    Attributes:
        dataset: its name in reasoning-gym, such as `chain_sum`.
        held_out: number of questions drawn for `test`, which may repeat in a small task.

    Raises:
        ConfigError: reasoning-gym is not installed, or has no task of that name.
    """

    dataset: str
    held_out: int = 500

    reply_tokens = 512

    def __post_init__(self) -> None:
        _library()
        from reasoning_gym.factory import DATASETS

        if self.dataset not in DATASETS:
            near = difflib.get_close_matches(self.dataset, list(DATASETS), n=3) or sorted(DATASETS)[:3]
            raise ConfigError(
                f"reasoning-gym has no task {self.dataset!r} among its {len(DATASETS)}; near: {', '.join(near)}"
            )

    @property
    def name(self) -> str:
        return f"reasoning-gym:{self.dataset}"

    def train(self, count: int, seed: int = 0) -> list[Example]:
        """`count` different questions; where the task has fewer, all of them in one order after another.

        Raises:
            ConfigError: every question of the task is held out.
        """
        held = {entry["question"] for entry in self._held_out(self.held_out)}
        start = random.Random(f"reasoning-gym {seed}").randrange(_TRAIN_SEEDS)
        # Four draws a question find `count` different ones unless the task is nearly exhausted.
        drawn = self._generator(4 * count, start)
        fresh: dict[str, dict[str, Any]] = {}
        for index in range(4 * count):
            entry = drawn[index]
            if entry["question"] not in held:
                fresh.setdefault(entry["question"], entry)
            if len(fresh) == count:
                break
        if not fresh:
            raise ConfigError(f"{self.name}: all of its {len(held)} different questions are held out")
        return [self._example(entry) for entry in passes(list(fresh.values()), count, seed)]

    def test(self, count: int) -> list[Example]:
        """The first `count` held-out questions.

        Raises:
            ConfigError: more are asked for than are held out.
        """
        if count > self.held_out:
            raise ConfigError(f"{self.name}: only {self.held_out} questions are held out, {count} were asked for")
        return [self._example(entry) for entry in self._held_out(count)]

    def score(self, reply: str, example: Example) -> bool:
        """Whether the task's own scorer gives full marks to what stands in the last <answer> tags, or to the reply.

        Raises:
            ConfigError: the example is not from this object's `train` or `test` (scorers need more than the answer).
        """
        if example.prompt not in self._entries:
            raise ConfigError(f"{self.name}: this question was not drawn here, so that it cannot be scored")
        tagged = _TAGGED.findall(reply)
        given = (tagged[-1] if tagged else reply).strip()
        return float(self._scorer.score_answer(given, self._entries[example.prompt])) >= 1.0

    def _held_out(self, count: int) -> list[dict[str, Any]]:
        """The first `count` held-out entries; drawn when asked for, since some tasks take a tenth of a second each."""
        while len(self._drawn) < count:
            self._drawn.append(self._test_generator[len(self._drawn)])
        return self._drawn[:count]

    @cached_property
    def _drawn(self) -> list[dict[str, Any]]:
        return []

    @cached_property
    def _test_generator(self) -> Any:
        return self._generator(self.held_out, _TEST_SEED)

    @cached_property
    def _entries(self) -> dict[str, dict[str, Any]]:
        return {}

    @cached_property
    def _scorer(self) -> Any:
        return self._generator(1, 0)

    def _generator(self, size: int, seed: int) -> Any:
        return _library().create_dataset(self.dataset, size=size, seed=seed)

    def _example(self, entry: dict[str, Any]) -> Example:
        prompt = entry["question"] + _INSTRUCTION
        self._entries[prompt] = entry
        answer = str(entry["answer"])
        return Example(prompt=prompt, context=f"\n(The correct answer is {answer}.)", answer=answer)


def _library() -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise ConfigError(
            "reasoning-gym is not installed, and its tasks need it: pip install 'deltalens[reasoning-gym]'"
        ) from None
    return reasoning_gym
