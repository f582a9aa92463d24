"""What a task is: examples, a scorer, and how an example becomes chat messages and dataset rows.

Plain Python without torch, so that the command line can name the tasks without loading a model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

__all__ = ["Example", "Task", "messages", "passes", "reply_limit", "to_dataset"]

_REPLY_LIMIT = 24

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question.

    Attributes:
        prompt: the user's message, all that the student sees beside the images.
        context: what a privileged teacher sees directly after the prompt, leading space included.
        answer: the right answer, for the scorer.
        images: paths of image files or PIL images, in the order in which the model sees them, before the prompt.
    """

    prompt: str
    context: str
    answer: str
    images: tuple[Any, ...] = ()


class Task(Protocol):
    """What training and evaluation ask of a task.

    A task whose replies are longer than a line also has `reply_tokens`, the longest reply that evaluation allows.
    """

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


def reply_limit(task: Task) -> int:
    """The longest reply, in tokens, that evaluation allows where the user names none."""
    return getattr(task, "reply_tokens", _REPLY_LIMIT)


def messages(example: Example, *, privileged: bool = False) -> list[dict[str, Any]]:
    """The example as a chat of one user message, as chat templates take it.

    Without images the content is a string. With images it is a list of parts: one `{"type": "image", "image": ...}`
    an image (the path or PIL image itself, which processors load), then the text.

    Args:
        example: the question.
        privileged: append the privileged context to the prompt.
    """
    text = example.prompt + example.context if privileged else example.prompt
    if not example.images:
        return [{"role": "user", "content": text}]
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in example.images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def to_dataset(examples: Sequence[Example]) -> Any:
    """The examples as a `datasets.Dataset` for TRL's trainers.

    Columns: `prompt` (one user message whose content is a string; TRL itself puts the images before it), `answer`,
    `privileged_context`, and `images` (a list of PIL images, decoded when read) if any example has images.
    """
    from datasets import Dataset, Features, Image, List, Value

    text = Value("string")
    features = {"prompt": List({"role": text, "content": text}), "answer": text, "privileged_context": text}
    rows: dict[str, list[Any]] = {
        "prompt": [[{"role": "user", "content": example.prompt}] for example in examples],
        "answer": [example.answer for example in examples],
        "privileged_context": [example.context for example in examples],
    }
    if any(example.images for example in examples):
        features["images"] = List(Image())
        rows["images"] = [list(example.images) for example in examples]
    return Dataset.from_dict(rows, features=Features(features))


def passes(items: Sequence[_Item], count: int, seed: int) -> list[_Item]:
    """`count` items: each once in shuffled order, then all again in another order."""
    pool = list(items)
    rng = random.Random(seed)
    drawn: list[_Item] = []
    while len(drawn) < count:
        rng.shuffle(pool)
        drawn += islice(pool, count - len(drawn))
    return drawn
