"""What surrounds a rollout: who samples it, what probability its tokens were drawn with, what a verifier says of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

__all__ = ["SamplingLogprobs", "group_advantage", "in_place_of_student", "recorded", "teacher_samples"]


def teacher_samples(share: float, seed: int, step: int) -> bool:
    """Whether the teacher samples the rollouts of a step: a coin with probability `share`.

    A function of seed and step alone, so that a resumed run and all processes see the same.
    """
    return share > 0 and random.Random(f"{seed}:{step}").random() < share


def group_advantage(rewards: Tensor, size: int) -> Tensor:
    """Rewards of groups of `size` samples to one prompt, normalised within each group; shapes (B,), float32.

    (r − mean) / (standard deviation + 1e-4), as in GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).
    """
    groups = rewards.float().reshape(-1, size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).reshape(-1)


class SamplingLogprobs(LogitsProcessor):
    """Keeps the log-probability of every token that `generate` samples, holding one step's scores at a time.

    At the temperature of the sampling; the cuts of top-k and top-p are left out, as is usual for importance ratios.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._last: Tensor | None = None
        self._found: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Called by `generate` with the sequences so far (B, L) and the next token's scores (B, V)."""
        self._settle(input_ids[:, -1])
        self._last = (scores.float() / self._temperature).log_softmax(-1)
        return scores

    def finish(self, completions: list[list[int]]) -> list[Tensor]:
        """The log-probabilities of each completion's tokens; the last step's scores are read here."""
        width = len(self._found) + 1
        last = torch.tensor([ids[width - 1] if len(ids) >= width else 0 for ids in completions])
        self._settle(last)
        table = torch.stack(self._found, 1)
        return [row[: len(ids)] for row, ids in zip(table, completions, strict=True)]

    def _settle(self, tokens: Tensor) -> None:
        if self._last is not None:
            self._found.append(self._last.gather(-1, tokens.to(self._last.device)[:, None])[:, 0])
            self._last = None


@contextmanager
def recorded(model: Any, recorder: SamplingLogprobs | None) -> Iterator[None]:
    """Within the block, `model.generate` also calls a recorder."""
    if recorder is None:
        yield
        return
    model.generate = partial(model.generate, logits_processor=LogitsProcessorList([recorder]))
    try:
        yield
    finally:
        del model.generate


@contextmanager
def in_place_of_student(trainer: Any, teacher: Any) -> Iterator[None]:
    """Within the block, the trainer's rollouts are sampled by a teacher."""
    student, engine = trainer.model_wrapped, trainer.use_vllm
    trainer.model_wrapped, trainer.use_vllm = teacher, False
    try:
        yield
    finally:
        trainer.model_wrapped, trainer.use_vllm = student, engine
