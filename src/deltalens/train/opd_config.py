"""The arguments of `OPDTrainer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trl import DistillationConfig

from deltalens.errors import ConfigError

__all__ = ["OPDConfig"]

_BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
_LOSSES = (*_BETA, "topk_forward_kl", "topk_reverse_kl", "k1")


@dataclass
class OPDConfig(DistillationConfig):
    """TRL's `DistillationConfig` with what on-policy distillation adds.

    Attributes:
        loss: divergence of student and teacher at every response token. The first three are over the full vocabulary;
            `topk_forward_kl` and `topk_reverse_kl` over the teacher's or the student's k likeliest tokens and one
            bucket for all others; `k1` is the policy gradient on the sampled token.
        topk: k of the two.
        token_share: share of the response tokens that the loss is taken over, rescaled to stand for all.
        token_selection: the tokens with the largest |log π_θ − log π_T|, or random ones.
        rollout_teacher_share: probability that a step's rollouts are sampled by the teacher and not by the student.
        log_ratio_clip: `k1`: bound of a token's advantage, in nats.
        importance_clip: `k1`: clip the ratio to the policy that sampled to 1 ± this. None: no ratio.
        samples_per_prompt: rollouts of each prompt; the batch size counts rollouts.
        reward_mix: `k1`: α of A = α A_OPD + (1 − α) A_reward, the latter normalised over the samples of a prompt.
        teacher_column: dataset column that names each row's teacher, where there are several.
    """

    # Two defaults of TRL's that cost time or change the saved config: recomputing activations takes a fifth of a step,
    # and without `use_cache` the trainer turns the cache off in the config that the student is saved with.
    gradient_checkpointing: bool = False
    use_cache: bool = True

    loss: Literal["reverse_kl", "forward_kl", "jsd", "topk_forward_kl", "topk_reverse_kl", "k1"] = "reverse_kl"
    topk: int = 32
    token_share: float = 1.0
    token_selection: Literal["log_ratio", "random"] = "log_ratio"
    rollout_teacher_share: float = 0.0
    log_ratio_clip: float | None = None
    importance_clip: float | None = None
    samples_per_prompt: int = 1
    reward_mix: float = 1.0
    teacher_column: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ConfigError: names the field and what it may be.
        """
        for name, good, allowed in (
            ("loss", self.loss in _LOSSES, f"one of {', '.join(_LOSSES)}"),
            ("topk", self.topk >= 1, "at least 1"),
            ("token_share", 0 < self.token_share <= 1, "above 0 and at most 1"),
            ("token_selection", self.token_selection in ("log_ratio", "random"), "log_ratio or random"),
            ("rollout_teacher_share", 0 <= self.rollout_teacher_share <= 1, "from 0 to 1"),
            ("log_ratio_clip", self.log_ratio_clip is None or self.log_ratio_clip > 0, "positive"),
            ("importance_clip", self.importance_clip is None or 0 < self.importance_clip < 1, "between 0 and 1"),
            ("samples_per_prompt", self.samples_per_prompt >= 1, "at least 1"),
            ("reward_mix", 0 <= self.reward_mix <= 1, "from 0 to 1"),
        ):
            if not good:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be {allowed}")
        for name in ("log_ratio_clip", "importance_clip"):
            if getattr(self, name) is not None and self.loss != "k1":
                raise ConfigError(f"{name} belongs to loss k1, and the loss is {self.loss}; leave it out")
        if self.reward_mix < 1 and (self.loss != "k1" or self.samples_per_prompt < 2):
            raise ConfigError("reward_mix below 1 needs loss k1 and samples_per_prompt of at least 2")
        self.beta = _BETA.get(self.loss, self.beta)
        super().__post_init__()
