"""What every trainer of ours has around TRL's: a stop at the first number that is none, and fast rollouts."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from deltalens.errors import DeltalensError

__all__ = ["FastRollouts", "Guarded", "diverged", "last_checkpoint"]


class Guarded:
    """Mixin, before a TRL trainer: a NaN or infinite loss stops the run before the optimizer sees its gradient."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, checked.

        Raises:
            DeltalensError: the loss is not finite, or sampling met probabilities that are none; names the step, the
                batch and the last good checkpoint.
        """
        trainer: Any = self
        inputs = trainer.last_batch = args[1] if len(args) > 1 else kwargs["inputs"]
        try:
            loss = super().training_step(*args, **kwargs)  # type: ignore[misc]  # the trainer behind the mixin
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise diverged(trainer, "the student gives no probabilities any more", inputs) from None
        if not loss.isfinite().all():
            raise diverged(trainer, f"the loss is {loss.item()}", inputs)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """TRL's, checked: a finite loss may have a gradient that is none, and a checkpoint after it is not good."""
        trainer: Any = self
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        # float16's loss scaler steps over infinite gradients by itself.
        if norm is not None and not trainer.args.fp16 and not math.isfinite(norm):
            raise diverged(trainer, f"the norm of the loss's gradient is {float(norm)}", trainer.last_batch)
        return norm


class FastRollouts:
    """Mixin for trainers that generate with transformers inside `_generate_single_turn` (distillation, GRPO).

    Checked against TRL 1.16.0. Each forward of `generate` enters and leaves accelerate's autocast, and leaving the
    outermost one drops the bfloat16 copies of the float32 weights: they were all cast anew for each token. One autocast
    around the whole rollout casts them once.
    """

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = self
        with trainer.accelerator.autocast():
            return super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]


def diverged(trainer: Any, what: str, inputs: Any = None) -> DeltalensError:
    """The error of a run that cannot go on: step, what happened, the batch, where to go back to."""
    saved = last_checkpoint(Path(trainer.args.output_dir))
    batch = _batch(trainer, inputs)
    return DeltalensError(
        f"training diverged at step {trainer.state.global_step + 1}: {what}{batch}; last good checkpoint: "
        f"{saved or 'none'}; lower the learning rate, or look at that batch"
    )


def _batch(trainer: Any, inputs: Any) -> str:
    """The batch by the beginnings of its texts, as far as the inputs tell."""
    if isinstance(inputs, list) and inputs and isinstance(inputs[0], dict):
        texts = [row.get("prompt", "") for row in inputs]
        texts = [t[-1]["content"] if isinstance(t, list) and t else t for t in texts]
        texts = [t if isinstance(t, str) else " ".join(p.get("text", "") for p in t) for t in texts]
    elif isinstance(inputs, dict) and ("input_ids" in inputs or "prompt_ids" in inputs):
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        ids = inputs.get("input_ids", inputs.get("prompt_ids"))
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    else:
        return ""
    shown = "; ".join(repr(" ".join(text.split())[-60:]) for text in texts[:3])
    return f"; batch of {len(texts)}: {shown}{', …' if len(texts) > 3 else ''}"


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint of the trainer. What a killed run left half written is removed."""
    complete: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        try:
            # The trainer writes this file last.
            step = json.loads((path / "trainer_state.json").read_text())["global_step"]
            complete.append((step, path))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path, ignore_errors=True)
    return str(max(complete)[1]) if complete else None
