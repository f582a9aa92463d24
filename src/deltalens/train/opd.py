"""On-policy distillation: TRL's `DistillationTrainer` with the losses, rollouts and teachers of the OPD papers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trl import DistillationConfig, DistillationTrainer

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, TrainerCallback

    from deltalens.train.teachers import EndpointTeacher

__all__ = ["OPDConfig", "OPDTrainer"]

_BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


@dataclass
class OPDConfig(DistillationConfig):
    """TRL's `DistillationConfig` with what on-policy distillation adds."""

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
        if self.loss in _BETA:
            self.beta = _BETA[self.loss]
        super().__post_init__()


class OPDTrainer(DistillationTrainer):
    """Distil one or several teachers into a student on rollouts of the student, the teacher, or both."""

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher_model: PreTrainedModel | dict[str, PreTrainedModel] | EndpointTeacher,
        args: OPDConfig,
        train_dataset: Dataset,
        processing_class: Any = None,
        reward: Callable[[str, dict[str, Any]], float] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        super().__init__(
            model=model,
            teacher_model=teacher_model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
