"""What an on-policy distillation step logs of student and teacher, from logits that the loss has computed anyway."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["MEASURES", "Measures"]

MEASURES = ("teacher_entropy", "topk_overlap", "log_ratio/q05", "log_ratio/q50", "log_ratio/q95")
_TOP = 16
_SAMPLE = 64  # tokens a batch whose entropies and overlap are taken: sorting all of them would cost what a loss costs


class Measures:
    """Collects over the chunks of one batch of N response tokens."""

    def __init__(self, count: int) -> None:
        self._stride = max(1, count // _SAMPLE)
        self._ratios: list[Tensor] = []
        self._student: list[Tensor] = []
        self._teacher: list[Tensor] = []
        self._overlap: list[Tensor] = []

    @torch.no_grad()
    def add(self, logits: Tensor, teacher: Any, tokens: Tensor) -> Tensor:
        """Take in a chunk: the student's logits (n, V), the teacher's view of it, the sampled tokens (n,).

        Returns:
            log π_θ − log π_T of the sampled tokens, shape (n,).
        """
        logits = logits.detach()
        own = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        ratio = own - teacher.logprob(tokens)
        self._ratios.append(ratio)
        rows = torch.arange(0, len(tokens), self._stride, device=tokens.device)
        few, seen = logits[rows], teacher.take(rows)
        self._student.append(_entropy(few))
        if hasattr(seen, "logits"):
            self._teacher.append(_entropy(seen.logits))
        k = min(_TOP, logits.shape[-1])
        theirs = seen.top(k)[0][:, :k]
        if theirs.shape[-1] == k:
            ours = few.topk(k, -1).indices
            self._overlap.append((ours[:, :, None] == theirs[:, None, :]).any(-1).float().mean(-1))
        return ratio

    def entropy(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Sum of the student's entropies in nats, and over how many tokens."""
        if not self._student:
            return torch.zeros((), device=device), torch.zeros((), dtype=torch.long, device=device)
        values = torch.cat(self._student)
        return values.sum(), torch.tensor(len(values), device=device)

    def values(self, device: torch.device) -> Tensor:
        """One value for each of `MEASURES`, NaN where there is nothing to say; shape (5,)."""
        nothing = torch.full((), torch.nan, device=device)
        means = [torch.cat(parts).mean() if parts else nothing for parts in (self._teacher, self._overlap)]
        if self._ratios:
            ratios = torch.cat(self._ratios).float()
            quantiles = torch.quantile(ratios, torch.tensor([0.05, 0.5, 0.95], device=device)).unbind()
        else:
            quantiles = (nothing,) * 3
        return torch.stack([*means, *quantiles])


def _entropy(logits: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return -torch.where(logp == -torch.inf, 0.0, logp.exp() * logp).sum(-1)
