"""On-policy self-distillation with a privileged context.

The student answers a prompt; the same model, shown the answer after the prompt, is the teacher; the loss is a
divergence of their next-token distributions at every token of the student's own reply (Shenfeld et al. 2026,
arXiv 2601.19897). TRL's SDFT trainer does the work; what differs is stated where it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltalens.train.arguments import trl_arguments
from deltalens.train.config import OPSDRun
from deltalens.train.data import rows
from deltalens.train.guard import Guarded
from deltalens.train.tasks import Example

__all__ = ["opsd_trainer"]

_ALPHA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


def opsd_trainer(
    run: OPSDRun,
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    checkpoints: Path,
    *,
    peft: Any = None,
    callbacks: Sequence[Any] = (),
) -> Any:
    """TRL's `SDFTTrainer` with one method narrowed.

    Args:
        run: the config.
        model: the student, loaded from a local folder: TRL loads a `base` or `ema` teacher anew from there.
        processor: its tokenizer.
        examples: prompts and privileged contexts.
        checkpoints: the trainer's folder.
        peft: a PEFT config, to train an adapter.
        callbacks: the trainer's, from its start on.
    """
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    class Trainer(Guarded, SDFTTrainer):
        # Checked against TRL 1.16.0: generation is in this method here. Why: see `FastRollouts`.
        def _generate(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
            with self.accelerator.autocast():
                return super()._generate(prompt_ids)

    trainer = Trainer(
        model=model,
        args=trl_arguments(
            SDFTConfig,
            run,
            checkpoints,
            num_generations=run.samples_per_prompt,
            max_completion_length=run.max_new_tokens,
            # `temperature` also divides the logits of the loss; only the sampling is to be sharpened.
            temperature=1.0,
            generation_kwargs={"temperature": run.temperature},
            distillation_mode="full_logits",
            distillation_alpha=_ALPHA[run.divergence],
            teacher_model_kind=run.teacher,
            teacher_update_rate=run.ema_rate,
            # SDFT loads the teacher with these, so it may have another dtype than the student; a moving average of
            # float32 weights must be float32 itself, or it would round each small step away.
            model_init_kwargs={"dtype": run.teacher_dtype if run.teacher == "base" else "float32"},
            teacher_prompt_template="{prompt}{privileged_context}",
        ),
        train_dataset=rows(examples),
        processing_class=processor,
        callbacks=list(callbacks),
        peft_config=peft,
    )
    teacher: Any = trainer.teacher_model
    if run.teacher == "base" and peft is None:
        # The head sees a slice of the hidden states. On a weight without gradient, matmul does not fold such a slice
        # into one matrix but copies the weight once for each row of the batch: two thirds of a step's forward time on
        # a CPU (torch 2.13). A contiguous slice is folded.
        teacher.get_output_embeddings().register_forward_pre_hook(
            lambda _module, inputs: (inputs[0].contiguous(), *inputs[1:])
        )
    return trainer
