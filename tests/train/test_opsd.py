"""The self-distillation trainer on a tiny random model, in float32 and in bfloat16."""

from pathlib import Path

import pytest
import torch

from deltalens.errors import DeltalensError
from deltalens.train.models import quiet_libraries
from deltalens.train.opsd import OPSDConfig, _last_checkpoint, make_trainer, train_opsd
from deltalens.train.tasks import Example, Sums

EXACT = {"bf16": False, "teacher_dtype": "float32"}


def config(**changes: object) -> OPSDConfig:
    return OPSDConfig.model_validate(
        {"steps": 4, "prompts_per_step": 4, "warmup_steps": 1, "learning_rate": 1e-3, "checkpoint_every": 2, **changes}
    )


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(tiny_model: Path, tmp_path: Path) -> None:
    examples = [Example(prompt=e.prompt, context="", answer=e.answer) for e in Sums().train(4)]
    for divergence in ("reverse_kl", "forward_kl", "jsd"):
        settings = config(steps=1, divergence=divergence, **EXACT)
        _, curve = train_opsd(tiny_model, examples, settings, checkpoints=tmp_path / divergence)
        assert abs(curve[0]["loss"]) < 1e-6
        assert curve[0]["grad_norm"] < 1e-4


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_the_loss_is_the_divergence_it_is_called(divergence: str, tiny_model: Path, tmp_path: Path) -> None:
    """Against a float64 twin on the logits of both models, mean over a reply's tokens, then over replies."""
    settings = config(steps=1, divergence=divergence, **EXACT)
    seen = []
    with quiet_libraries():
        trainer = make_trainer(tiny_model, Sums().train(4), settings, checkpoints=tmp_path)
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
        trainer = make_trainer(tiny_model, Sums().train(4), config(rollout_temperature=0.25), checkpoints=tmp_path)
    assert trainer.generation_config.temperature == 0.25
    assert trainer.temperature == 1.0
    assert next(trainer.model.parameters()).dtype == torch.float32
    assert next(trainer.teacher_model.parameters()).dtype == torch.bfloat16


def test_an_interrupted_run_goes_on_to_the_same_weights_and_curve(tiny_model: Path, tmp_path: Path) -> None:
    examples = Sums().train(24)
    whole, curve = train_opsd(tiny_model, examples, config(steps=6), checkpoints=tmp_path / "whole")
    assert len(curve) == 6
    assert len({entry["loss"] for entry in curve}) == 6

    def interrupt(step: int, _steps: int, _loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_opsd(tiny_model, examples, config(steps=6), checkpoints=tmp_path / "cut", on_step=interrupt)
    # A kill while a checkpoint is written leaves one without its last file.
    (tmp_path / "cut" / "checkpoint-5").mkdir()
    steps: list[int] = []
    resumed, again = train_opsd(
        tiny_model,
        examples,
        config(steps=6),
        checkpoints=tmp_path / "cut",
        on_step=lambda step, *_: steps.append(step),
    )
    assert steps == [5, 6]
    assert again == curve
    weights = resumed.state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    assert _last_checkpoint(tmp_path / "absent") is None
    for step, text in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"glob'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    assert _last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]


def test_divergence_to_nan_stops_the_run(tiny_model: Path, tmp_path: Path) -> None:
    settings = config(steps=6, learning_rate=1e37, warmup_steps=0)
    with pytest.raises(DeltalensError, match=r"diverged at step \d.*last good checkpoint.*lower the learning rate"):
        train_opsd(tiny_model, Sums().train(24), settings, checkpoints=tmp_path)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="learning_rat"):
        config(learning_rat=1.0)
    with pytest.raises(ValueError, match="divergence"):
        config(divergence="hellinger")
