"""The self-distillation trainer on a tiny random model, in float32 and in bfloat16."""

from pathlib import Path
from typing import Any

import pytest
import torch

from deltalens.train.config import OPSDRun
from deltalens.train.models import load_model, load_tokenizer, quiet_libraries
from deltalens.train.opsd import opsd_trainer
from deltalens.train.tasks import Example, Sums

EXACT = {"bf16": False, "teacher_dtype": "float32"}


def trainer_of(model: Path, folder: Path, examples: list[Example] | None = None, **changes: Any) -> Any:
    run = OPSDRun.model_validate(
        {"method": "opsd", "steps": 1, "prompts_per_step": 4, "warmup_steps": 0, "learning_rate": 1e-3, **changes}
    )
    return opsd_trainer(run, load_model(model, "float32"), load_tokenizer(model), examples or Sums().train(4), folder)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(
    divergence: str, tiny_model: Path, tmp_path: Path
) -> None:
    examples = [Example(prompt=e.prompt, context="", answer=e.answer) for e in Sums().train(4)]
    with quiet_libraries():
        trainer = trainer_of(tiny_model, tmp_path, examples, divergence=divergence, **EXACT)
        trainer.train()
    assert abs(trainer.state.log_history[0]["loss"]) < 1e-6
    assert trainer.state.log_history[0]["grad_norm"] < 1e-4


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_the_loss_is_the_divergence_it_is_called(divergence: str, tiny_model: Path, tmp_path: Path) -> None:
    """Against a float64 twin on the logits of both models, mean over a reply's tokens, then over replies."""
    seen = []
    with quiet_libraries():
        trainer = trainer_of(tiny_model, tmp_path, divergence=divergence, **EXACT)
        inner = trainer._compute_teacher_student_logits

        def spy(*args: object, **kwargs: object) -> object:
            seen.append(inner(*args, **kwargs))
            return seen[-1]

        trainer._compute_teacher_student_logits = spy
        trainer.train()
    (logits,) = seen
    student = logits.student_logits.detach().double().softmax(-1)
    teacher = logits.teacher_logits.double().softmax(-1)
    assert (student - teacher).abs().max() > 0.01, "the context must make a difference"

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p * (p / q).log()).sum(-1)

    middle = (student + teacher) / 2
    token = {
        "reverse_kl": kl(student, teacher),
        "forward_kl": kl(teacher, student),
        "jsd": (kl(student, middle) + kl(teacher, middle)) / 2,
    }[divergence]
    mask = logits.loss_mask.double()
    twin = ((token * mask).sum(1) / mask.sum(1)).mean().item()
    # SDFT logs the mean over all tokens of the step beside the loss it descends; the latter is what we take.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(twin, rel=1e-4)


def test_sampling_is_sharpened_and_the_loss_is_not(tiny_model: Path, tmp_path: Path) -> None:
    with quiet_libraries():
        trainer = trainer_of(tiny_model, tmp_path, temperature=0.25)
    assert trainer.generation_config.temperature == 0.25
    assert trainer.temperature == 1.0
    assert next(trainer.model.parameters()).dtype == torch.float32
    assert next(trainer.teacher_model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("teacher", ["base", "ema", "live"])
def test_which_model_teaches(teacher: str, tiny_model: Path, tmp_path: Path) -> None:
    """After three steps: the base is what it was, the live teacher is the student, the average lies between."""
    with quiet_libraries():
        trainer = trainer_of(
            tiny_model, tmp_path, Sums().train(12), steps=3, teacher=teacher, ema_rate=0.5, learning_rate=1e-2, **EXACT
        )
        trainer.train()
    start = load_model(tiny_model, "float32").state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    student, held = trainer.model.state_dict()[name], trainer.teacher_model.state_dict()[name]
    moved, away = (student - start[name]).norm(), (held - start[name]).norm()
    assert moved > 0
    expected = {"base": away == 0, "live": torch.equal(held, student), "ema": 0 < away < moved}
    assert expected[teacher]
