"""On-policy self-distillation with a privileged context.

The student answers a prompt; the same model, as it was before training and shown the answer after the prompt, is the
teacher; the loss is a divergence of their next-token distributions at every token of the student's own reply
(Shenfeld et al. 2026, arXiv 2601.19897). TRL's SDFT trainer does the work; what differs is stated where it does.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deltalens.errors import DeltalensError
from deltalens.train.models import load_model, load_tokenizer, quiet_libraries
from deltalens.train.tasks import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["OPSDConfig", "make_trainer", "train_opsd"]

_ALPHA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


class OPSDConfig(BaseModel):
    """How a student is trained. Everything that changes the result is here.

    Attributes:
        steps: optimizer steps.
        prompts_per_step: different prompts in a step, one rollout each.
        learning_rate: AdamW's, constant after the warm-up; no weight decay.
        warmup_steps: steps of linear warm-up.
        max_new_tokens: longest rollout.
        rollout_temperature: of the student's sampling. The divergence is always taken at temperature 1. Below 1,
            a small model's rollouts keep to replies worth learning from.
        divergence: of student and teacher, over the full vocabulary.
        max_grad_norm: gradient clipping.
        bf16: run student and teacher under bfloat16 autocast. The student's weights are float32 either way.
        teacher_dtype: dtype of the teacher's weights.
        checkpoint_every: steps between checkpoints that a killed run resumes from.
        seed: of the prompts' order and of the sampling.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=30, ge=1)
    prompts_per_step: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=5e-5, gt=0)
    warmup_steps: int = Field(default=5, ge=0)
    max_new_tokens: int = Field(default=12, ge=1)
    rollout_temperature: float = Field(default=0.5, gt=0)
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    max_grad_norm: float = Field(default=1.0, gt=0)
    bf16: bool = True
    teacher_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    checkpoint_every: int = Field(default=10, ge=1)
    seed: int = Field(default=0, ge=0)


def train_opsd(
    model: Path,
    examples: Sequence[Example],
    config: OPSDConfig,
    *,
    checkpoints: Path,
    on_step: Callable[[int, int, float], None] | None = None,
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """Train a student from the model in a folder, which is also its teacher.

    Killed at any moment, the same call goes on from the last checkpoint in `checkpoints`, with the same result.

    Args:
        model: a local model folder with a chat template.
        examples: at least `steps * prompts_per_step` of them are worth having; fewer are seen again.
        config: see `OPSDConfig`.
        checkpoints: a folder of our own for the trainer's checkpoints (float32 weights and optimizer state).
        on_step: called after each step with the step, the number of steps and the loss.

    Returns:
        The student with float32 weights, and one dict a step with `step`, `loss`, `grad_norm`, `learning_rate` and
        `reply_tokens`.

    Raises:
        ConfigError: the model cannot be loaded.
        DeltalensError: the loss became NaN or infinite.
    """
    with quiet_libraries():
        trainer = make_trainer(model, examples, config, checkpoints=checkpoints, on_step=on_step)
        trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints))
    return trainer.model, _curve(trainer.state.log_history)


def make_trainer(
    model: Path,
    examples: Sequence[Example],
    config: OPSDConfig,
    *,
    checkpoints: Path,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Any:
    """The trainer behind `train_opsd`: TRL's `SDFTTrainer` with one method narrowed."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl.experimental.sdft import SDFTTrainer

    class Trainer(SDFTTrainer):
        # Checked against TRL 1.16.0. Each forward of `generate` enters and leaves accelerate's autocast, and leaving
        # the outermost one drops the bfloat16 copies of the float32 weights: they were all cast anew for each token.
        # One autocast around the whole rollout casts them once.
        def _generate(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
            try:
                with self.accelerator.autocast():
                    return super()._generate(prompt_ids)
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise _diverged(
                    self.state.global_step, "the student gives no probabilities any more", self.args
                ) from None

    tokenizer = load_tokenizer(model)
    trainer = Trainer(
        model=load_model(model, "float32"),
        args=_arguments(config, checkpoints),
        train_dataset=Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": e.prompt}], "privileged_context": e.context}
                for e in examples[: config.steps * config.prompts_per_step]
            ]
        ),
        processing_class=tokenizer,
        callbacks=[_watcher(on_step)],
    )
    trainer.remove_callback(PrinterCallback)  # prints every log line as a dict where the trainer has no bar
    # The head sees a slice of the hidden states. On a weight without gradient, matmul does not fold such a slice into
    # one matrix but copies the weight once for each row of the batch: two thirds of a step's forward time on a CPU
    # (torch 2.13). A contiguous slice is folded.
    teacher: Any = trainer.teacher_model
    teacher.get_output_embeddings().register_forward_pre_hook(
        lambda _module, inputs: (inputs[0].contiguous(), *inputs[1:])
    )
    return trainer


def _arguments(config: OPSDConfig, checkpoints: Path) -> Any:
    import torch
    from trl.experimental.sdft import SDFTConfig

    return SDFTConfig(
        output_dir=str(checkpoints),
        max_steps=config.steps,
        per_device_train_batch_size=config.prompts_per_step,
        gradient_accumulation_steps=1,
        num_generations=1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=config.warmup_steps,
        weight_decay=0.0,
        max_grad_norm=config.max_grad_norm,
        max_completion_length=config.max_new_tokens,
        # `temperature` also divides the logits of the loss; only the sampling is to be sharpened.
        temperature=1.0,
        generation_kwargs={"temperature": config.rollout_temperature},
        distillation_mode="full_logits",
        distillation_alpha=_ALPHA[config.divergence],
        teacher_model_kind="base",
        # SDFT loads the teacher anew from the student's own path with these, so it may have another dtype.
        model_init_kwargs={"dtype": config.teacher_dtype},
        teacher_prompt_template="{prompt}{privileged_context}",
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,  # the default of TRL, 20 % slower; these models are small
        use_cache=True,  # else the trainer turns it off in the config that the student is saved with
        seed=config.seed,
        data_seed=config.seed,
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        save_total_limit=1,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would show a NaN as the loss before; ours stops the run
        report_to=[],
        disable_tqdm=True,
    )


def _watcher(on_step: Callable[[int, int, float], None] | None) -> Any:
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        """Reports each step, and stops the run at a loss that is no number."""

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs is None or "loss" not in logs:
                return
            loss, norm = float(logs["loss"]), float(logs["grad_norm"])
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise _diverged(state.global_step, f"the loss is {loss} and its gradient's norm {norm}", args)
            if on_step is not None:
                on_step(state.global_step, state.max_steps, loss)

    return Watcher()


def _diverged(step: int, what: str, args: Any) -> DeltalensError:
    saved = _last_checkpoint(Path(args.output_dir))
    return DeltalensError(
        f"training diverged at step {step}: {what}; last good checkpoint: {saved or 'none'}; lower the learning rate"
    )


def _last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint. What a killed run left half written is removed."""
    complete: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        try:
            # The trainer writes this file last.
            step = json.loads((path / "trainer_state.json").read_text())["global_step"]
            complete.append((step, path))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path, ignore_errors=True)
    return str(max(complete)[1]) if complete else None


def _curve(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    return [
        {
            "step": entry["step"],
            "loss": float(entry["loss"]),
            "grad_norm": float(entry["grad_norm"]),
            "learning_rate": float(entry["learning_rate"]),
            "reply_tokens": float(entry["completions/mean_length"]),
        }
        for entry in history
        if "loss" in entry
    ]
