"""What on-policy distillation is held against: supervised fine-tuning, sequence-level distillation, GRPO.

TRL trains; here its trainers get their data and a stop at the first number that is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from blake3 import blake3

from deltalens.files import whole_file
from deltalens.train.arguments import trl_arguments
from deltalens.train.config import GRPORun, Run, SeqKDRun
from deltalens.train.data import data_hash, rows
from deltalens.train.evaluate import generate
from deltalens.train.guard import FastRollouts, Guarded
from deltalens.train.models import load_for_generation, load_processor
from deltalens.train.tasks import Example, Task

__all__ = ["grpo_trainer", "sft_trainer", "teacher_replies"]


def sft_trainer(
    run: Run,
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    checkpoints: Path,
    *,
    peft: Any = None,
    callbacks: Sequence[Any] = (),
) -> Any:
    """TRL's `SFTTrainer` on the examples' answers; only the answer's tokens count in the loss."""
    import trl.trainer.utils
    from trl import SFTConfig, SFTTrainer

    class Trainer(Guarded, SFTTrainer):
        # Checked against TRL 1.16.0. Off Triton its fused head scores every position, prompts and padding included,
        # lest compilers meet a new shape each batch; on a CPU that is four fifths of a small model's step. This takes
        # the branch that GPUs take, which scores the labels alone.
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            with patch.object(trl.trainer.utils, "_use_triton", lambda _device: True):
                return super().compute_loss(*args, **kwargs)

    return Trainer(
        model=model,
        args=trl_arguments(SFTConfig, run, checkpoints),
        train_dataset=rows(examples, completions=True),
        processing_class=processor,
        callbacks=list(callbacks),
        peft_config=peft,
    )


def teacher_replies(
    run: SeqKDRun,
    teacher: Path,
    examples: Sequence[Example],
    cache: Path,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Example]:
    """The examples with the teacher's replies as answers; generated once, then taken from `cache`.

    Args:
        run: temperature (0 is greedy), longest reply and seed of the generation.
        teacher: the teacher's folder.
        examples: the prompts.
        cache: JSON lines: a first line that says what the replies are of, then a reply each.
        on_progress: called with replies done and in all.
    """
    key = _key(run, teacher, examples)
    replies = _cached(cache, key, len(examples))
    if replies is None:
        network = load_for_generation(teacher)
        generated = generate(
            network,
            load_processor(teacher),
            [example.prompt for example in examples],
            images=[example.images for example in examples] if any(e.images for e in examples) else None,
            temperature=run.temperature,
            max_new_tokens=run.max_new_tokens,
            seed=run.seed,
            on_progress=on_progress,
        )
        replies = [text for text, _tokens, _cut in generated]
        with whole_file(cache) as temporary, temporary.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps({"key": key}) + "\n")
            stream.writelines(json.dumps({"reply": reply}, ensure_ascii=False) + "\n" for reply in replies)
    return [replace(example, answer=reply) for example, reply in zip(examples, replies, strict=True)]


def _key(run: SeqKDRun, teacher: Path, examples: Sequence[Example]) -> str:
    """Changes with everything the replies depend on; the teacher by its files' names, sizes and times."""
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(teacher.iterdir()) if f.is_file()]
    settings = [run.temperature, run.max_new_tokens, run.seed]
    return blake3(json.dumps([files, settings, data_hash(examples)]).encode()).hexdigest()


def _cached(cache: Path, key: str, count: int) -> list[str] | None:
    try:
        lines = cache.read_text(encoding="utf-8").splitlines()
        if json.loads(lines[0])["key"] != key or len(lines) != count + 1:
            return None
        return [json.loads(line)["reply"] for line in lines[1:]]
    except (OSError, ValueError, KeyError, IndexError):
        return None


def grpo_trainer(
    run: GRPORun,
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    task: Task,
    checkpoints: Path,
    *,
    peft: Any = None,
    callbacks: Sequence[Any] = (),
) -> Any:
    """TRL's `GRPOTrainer`; the reward is 1 where the task's scorer says right, else 0."""
    from trl import GRPOConfig, GRPOTrainer

    class Trainer(Guarded, FastRollouts, GRPOTrainer):
        pass

    def correct(completions: list[Any], index: list[int], **_: Any) -> list[float | None]:
        replies = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [float(task.score(reply, examples[i])) for reply, i in zip(replies, index, strict=True)]

    return Trainer(
        model=model,
        reward_funcs=correct,
        args=trl_arguments(
            GRPOConfig,
            run,
            checkpoints,
            num_generations=run.samples_per_prompt,
            max_completion_length=run.max_new_tokens,
            temperature=run.temperature,
            beta=run.kl_weight,
        ),
        train_dataset=rows(examples),
        processing_class=processor,
        callbacks=list(callbacks),
        peft_config=peft,
    )
