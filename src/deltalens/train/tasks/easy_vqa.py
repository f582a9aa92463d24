"""easy-VQA (Zhou 2019): questions on the one coloured shape in a 64 × 64 image, as PyPI's `easy-vqa` carries them."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from deltalens.errors import ConfigError
from deltalens.train.tasks.base import Example, passes

__all__ = ["EasyVQA"]

_KINDS = (
    frozenset({"yes", "no"}),
    frozenset({"circle", "rectangle", "triangle"}),
    frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}),
)


@dataclass(frozen=True)
class EasyVQA:
    """38,575 training questions on 4,000 images and 9,673 held-out ones on 1,000 others, with 13 answers.

    The split is the package's, by image; the question texts are the same 107 on both sides. The best answer to each
    of them without the image is right on 67.0 % of the held-out questions.

    Raises:
        ConfigError: the package is not installed.
    """

    name = "easy-vqa"
    reply_tokens = 8

    def __post_init__(self) -> None:
        _library()

    def train(self, count: int, seed: int = 0) -> list[Example]:
        """`count` training questions: all in shuffled order, then all again."""
        return passes(self._training, count, seed)

    def test(self, count: int) -> list[Example]:
        """The first `count` held-out questions, in one shuffled order (the package sorts them by image).

        Raises:
            ConfigError: more are asked for than there are.
        """
        held = self._held_out
        if count > len(held):
            raise ConfigError(f"{self.name}: only {len(held)} questions are held out, {count} were asked for")
        return held[:count]

    def score(self, reply: str, example: Example) -> bool:
        """Whether the reply names the right answer and no other of its kind (yes or no, a shape, a colour)."""
        kind = next(kind for kind in _KINDS if example.answer in kind)
        return kind.intersection(re.findall(r"[a-z]+", reply.lower())) == {example.answer}

    @cached_property
    def _training(self) -> list[Example]:
        package = _library()
        return _examples(package.get_train_questions(), package.get_train_image_paths())

    @cached_property
    def _held_out(self) -> list[Example]:
        package = _library()
        examples = _examples(package.get_test_questions(), package.get_test_image_paths())
        random.Random(self.name).shuffle(examples)
        return examples


def _examples(questions: Any, images: dict[int, str]) -> list[Example]:
    return [
        Example(
            prompt=f"{question[0].upper()}{question[1:]} Reply with one word.",
            context=f" (The correct answer is {answer}.)",
            answer=answer,
            images=(images[image],),
        )
        for question, answer, image in zip(*questions, strict=True)
    ]


def _library() -> Any:
    try:
        import easy_vqa
        import PIL  # noqa: F401  # reads the images
    except ImportError:
        raise ConfigError(
            "easy-vqa or Pillow is not installed, and this task needs both: pip install 'deltalens[vision]'"
        ) from None
    return easy_vqa
