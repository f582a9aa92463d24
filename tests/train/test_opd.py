"""The on-policy distillation trainer on tiny random models."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vision_fixtures
from opd_fixtures import another, config, history, rows, trainer

from deltalens.errors import ConfigError, DeltalensError
from deltalens.train.guard import last_checkpoint
from deltalens.train.models import load_model, load_tokenizer, quiet_libraries
from deltalens.train.rollouts import SamplingLogprobs, group_advantage, teacher_samples

LOSSES = ["reverse_kl", "forward_kl", "jsd", "topk_forward_kl", "topk_reverse_kl", "k1"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_libraries():
        yield


@pytest.mark.parametrize("loss", LOSSES)
def test_a_student_equal_to_its_teacher_stays(loss: str, tiny_model: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path, teacher=load_model(tiny_model, "float32"), loss=loss, max_steps=1)
    run.train()
    assert abs(history(run, "loss")[0]) < 1e-6
    assert history(run, "grad_norm")[0] < 1e-4
    entry = run.state.log_history[0]
    assert entry["topk_overlap"] == 1
    assert entry["teacher_entropy"] == pytest.approx(entry["entropy"], rel=1e-5)
    assert [entry[f"log_ratio/{q}"] for q in ("q05", "q50", "q95")] == pytest.approx([0, 0, 0], abs=1e-5)


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl", "jsd"])
def test_loss_and_gradient_are_those_of_trls_trainer(loss: str, tiny_model: Path, tmp_path: Path) -> None:
    """The same batch through TRL's own `_compute_loss` and ours: with padding, and a count over the batch."""
    from trl import DistillationTrainer

    run = trainer(tiny_model, tmp_path, loss=loss)
    run.model.train()
    inputs = run._generate_and_score_completions(rows(4))
    inputs["completion_mask"][1, 3:] = 0
    found = []
    for compute in (run._compute_loss, lambda *a: DistillationTrainer._compute_loss(run, *a)):
        if compute is not run._compute_loss:
            (run.teacher_model,) = run._teachers.models.values()
        run.model.zero_grad()
        value, *_ = compute(run.model, inputs, torch.tensor(11.0))
        value.backward()
        found.append((value.item(), [w.grad.clone() for w in run.model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][0] > 0.01
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)


def test_the_forward_pass_is_under_autocast(tiny_model: Path, tmp_path: Path) -> None:
    """With `bf16` the student's products run in bfloat16; TRL's redirected forward leaves autocast out."""
    run = trainer(tiny_model, tmp_path, bf16=True, max_steps=1)
    seen = []
    run.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    run.train()
    assert set(seen) == {torch.bfloat16}
    assert run.model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("loss", ["reverse_kl", "topk_forward_kl"])
def test_the_student_comes_to_its_teacher(loss: str, tiny_model: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path, loss=loss, max_steps=16, per_device_train_batch_size=8, count=128)
    run.train()
    losses = history(run, "loss")
    assert sum(losses[-4:]) < 0.65 * sum(losses[:4])
    entry = run.state.log_history[3]
    assert entry["generation_tokens_per_s"] > 0
    assert entry["training_tokens_per_s"] > 0
    assert 0 <= entry["truncation_rate"] <= 1
    assert entry["log_ratio/q05"] < entry["log_ratio/q50"] < entry["log_ratio/q95"]
    assert 0 < entry["topk_overlap"] < 1
    assert history(run, "topk_overlap")[-1] > entry["topk_overlap"]


def test_a_share_of_the_tokens_is_rescaled(tiny_model: Path, tmp_path: Path) -> None:
    """The kept tokens' losses times T / kept; what is logged is of all tokens either way."""
    run = trainer(tiny_model, tmp_path, loss="k1", token_share=0.4)
    run.model.train()
    inputs = run._generate_and_score_completions(rows(4))
    value, entropy, counted = run._compute_loss(run.model, inputs, None)
    (ratios,) = run._measures._ratios
    kept = ratios.abs().topk(round(0.4 * len(ratios))).indices
    assert value.item() == pytest.approx(ratios[kept].mean().item(), rel=1e-5)
    assert counted == len(ratios)
    run._objective.args.token_share = 1.0
    whole, entropy_of_all, _ = run._compute_loss(run.model, inputs, None)
    assert whole.item() == pytest.approx(ratios.mean().item(), rel=1e-5)
    assert entropy.item() == pytest.approx(entropy_of_all.item(), rel=1e-5)


def test_rows_are_taught_by_the_teacher_they_name(tiny_model: Path, tmp_path: Path) -> None:
    """Routed over two teachers, a batch's loss is the sum of each half's with its own teacher."""
    teachers = {"a": another(tiny_model, 1), "b": another(tiny_model, 2)}
    run = trainer(tiny_model, tmp_path, teacher=teachers, teacher_column="domain")
    run.model.train()
    inputs = run._generate_and_score_completions(rows(4))
    assert inputs["teacher"].tolist() == [0, 1, 0, 1]
    both, *_ = run._compute_loss(run.model, inputs, torch.tensor(1.0))
    halves = 0.0
    for index, name in enumerate("ab"):
        alone = trainer(tiny_model, tmp_path, teacher=another(tiny_model, index + 1))
        mine = [i for i, row in enumerate(rows(4)) if row["domain"] == name]
        part = {k: v[mine] for k, v in inputs.items() if k.startswith(("prompt", "completion"))}
        halves += alone._compute_loss(alone.model, part, torch.tensor(1.0))[0].item()
    assert both.item() == pytest.approx(halves, rel=1e-5)
    run.train()
    assert len(history(run, "loss")) == 2
    with pytest.raises(ConfigError, match=r"names teacher 'b'.*\['a', 'c'\]"):
        trainer(tiny_model, tmp_path, teacher={"a": teachers["a"], "c": teachers["b"]}, teacher_column="domain")
    with pytest.raises(ConfigError, match="teacher_column must say"):
        trainer(tiny_model, tmp_path, teacher=teachers)
    with pytest.raises(ConfigError, match=r"no column 'topic' \(teacher_column\)"):
        trainer(tiny_model, tmp_path, teacher=teachers, teacher_column="topic")


def test_the_teacher_samples_its_share_of_the_steps(tiny_model: Path, tmp_path: Path) -> None:
    """Its samples keep the probability that it drew them with: the importance ratio is to the teacher."""
    draws = [teacher_samples(0.3, 5, step) for step in range(4000)]
    assert sum(draws) / 4000 == pytest.approx(0.3, abs=0.04)
    assert draws == [teacher_samples(0.3, 5, step) for step in range(4000)]
    assert not any(teacher_samples(0.0, s, s) for s in range(99))
    assert all(teacher_samples(1.0, s, s) for s in range(99))
    for share, sampler in ((0.0, "student"), (1.0, "teacher")):
        run = trainer(tiny_model, tmp_path, loss="k1", importance_clip=0.2, rollout_teacher_share=share)
        run.model.train()
        inputs = run._generate_and_score_completions(rows(4))
        (teacher,) = run._teachers.models.values()
        model = run.model if sampler == "student" else teacher
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logp = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.log_softmax(-1)
        width = inputs["completion_ids"].shape[1]
        drawn = logp[:, -width - 1 : -1].gather(-1, inputs["completion_ids"][:, :, None])[:, :, 0]
        keep = inputs["completion_mask"].bool()
        assert torch.allclose(inputs["sampling"][keep], drawn[keep], atol=1e-4), sampler
        assert run._metrics["train"]["rollouts_by_teacher"] == [share]


def test_sampling_logprobs_are_of_each_tokens_own_step() -> None:
    """Also for completions that ended before the last step."""
    torch.manual_seed(0)
    scores = torch.randn(4, 2, 9)
    tokens = [[3, 1, 4, 1], [5, 8]]
    recorder = SamplingLogprobs(0.5)
    for step in range(4):
        so_far = torch.tensor([[7, 7, *(ids + [0] * 4)[:step]] for ids in tokens])
        assert torch.equal(recorder(so_far, scores[step]), scores[step])
    found = recorder.finish(tokens)
    for row, ids in enumerate(tokens):
        wanted = [(scores[t, row] / 0.5).log_softmax(-1)[word].item() for t, word in enumerate(ids)]
        assert found[row].tolist() == pytest.approx(wanted, abs=1e-6)


def test_a_reward_is_normalised_within_the_samples_of_a_prompt(tiny_model: Path, tmp_path: Path) -> None:
    assert group_advantage(torch.tensor([1.0, 0.0, 3.0, 3.0]), 2).tolist() == pytest.approx(
        [0.5 / (math.sqrt(0.5) + 1e-4), -0.5 / (math.sqrt(0.5) + 1e-4), 0, 0]
    )
    seen: list[tuple[str, str]] = []

    def reward(completion: str, row: dict[str, Any]) -> float:
        seen.append((completion, row["answer"]))
        return float(len(seen) % 2)

    run = trainer(tiny_model, tmp_path, loss="k1", samples_per_prompt=2, reward_mix=0.5, reward=reward, max_steps=1)
    run.train()
    answers = [answer for _, answer in seen]
    assert answers[0] == answers[1] != answers[2] == answers[3], "two samples of each of two prompts"
    assert history(run, "reward") == [0.5]
    inputs = run._generate_and_score_completions([*rows(1) * 2, *rows(2)[1:] * 2])
    wanted = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert inputs["reward"].tolist() == pytest.approx([wanted, -wanted] * 2)
    run.model.train()
    mixed, *_ = run._compute_loss(run.model, inputs, None)
    keep = inputs["completion_mask"].bool()
    advantage = 0.5 * -torch.cat(run._measures._ratios) + 0.5 * inputs["reward"][:, None].expand(keep.shape)[keep]
    assert mixed.item() == pytest.approx(-advantage.mean().item(), rel=1e-5)


def test_accumulated_batches_and_samples_keep_their_tensors(tiny_model: Path, tmp_path: Path) -> None:
    """Everything that k1 can carry, through TRL's shuffle and split of the step's rollouts."""
    run = trainer(
        tiny_model,
        tmp_path,
        teacher={"a": another(tiny_model, 1), "b": another(tiny_model, 2)},
        teacher_column="domain",
        loss="k1",
        importance_clip=0.2,
        log_ratio_clip=3.0,
        token_share=0.5,
        token_selection="random",
        rollout_teacher_share=0.5,
        samples_per_prompt=2,
        reward_mix=0.5,
        reward=lambda text, row: float(len(text) % 3),
        gradient_accumulation_steps=2,
        max_steps=4,
        count=16,
    )
    run.train()
    assert all(map(math.isfinite, history(run, "loss")))
    assert {0.0, 1.0} >= set(history(run, "rollouts_by_teacher"))


def test_an_interrupted_run_goes_on_to_the_same_curve(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    settings = {
        "loss": "k1",
        "rollout_teacher_share": 0.5,
        "token_share": 0.5,
        "token_selection": "random",
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "count": 24,
    }
    whole = trainer(tiny_model, tmp_path / "whole", **settings)
    whole.train()
    assert set(history(whole, "rollouts_by_teacher")) == {0.0, 1.0}
    cut = trainer(tiny_model, tmp_path / "cut", **settings)
    cut.add_callback(Kill())
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again = trainer(tiny_model, tmp_path / "cut", **settings)
    again.train(resume_from_checkpoint=last_checkpoint(tmp_path / "cut"))
    assert history(again, "loss") == history(whole, "loss")
    for ours, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_loss_that_is_no_number_stops_the_run(tiny_model: Path, tmp_path: Path) -> None:
    teacher = another(tiny_model)
    with torch.no_grad():
        teacher.lm_head.weight[3] = torch.nan
    run = trainer(tiny_model, tmp_path, teacher=teacher)
    before = [w.clone() for w in run.model.parameters()]
    with pytest.raises(DeltalensError, match=r"step 1: the loss is nan; batch of 4: .*last good checkpoint: none"):
        run.train()
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_a_gradient_that_is_no_number_stops_the_run_before_the_step(tiny_model: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path)
    run.model.model.norm.weight.register_hook(lambda gradient: gradient * torch.nan)
    before = [w.clone() for w in run.model.parameters()]
    with pytest.raises(DeltalensError, match=r"step 1: the norm of the loss's gradient is nan"):
        run.train()
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_a_student_without_probabilities_stops_the_run(tiny_model: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path)
    with torch.no_grad():
        run.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(DeltalensError, match=r"step 1: the student gives no probabilities any more; batch of 4"):
        run.train()


def test_an_adapter_is_trained_alone(tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    run = trainer(tiny_model, tmp_path, peft_config=LoraConfig(r=2, target_modules="all-linear"))
    names = {name for name, weight in run.model.named_parameters() if weight.requires_grad}
    assert names
    assert all("lora_" in name for name in names)
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    run.train()
    moved = {name for name, weight in run.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == names


def test_what_cannot_be_meant_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from deltalens.train.opd import OPDTrainer
    from deltalens.train.teachers import EndpointTeacher

    for changes, message in (
        ({"loss": "hellinger"}, "loss is 'hellinger'; it must be one of forward_kl"),
        ({"token_share": 0.0}, "token_share is 0.0"),
        ({"importance_clip": 0.2}, "importance_clip belongs to loss k1"),
        ({"loss": "k1", "reward_mix": 0.5}, "samples_per_prompt of at least 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(tmp_path, **changes)
    with pytest.raises(ConfigError, match="there is no reward"):
        trainer(tiny_model, tmp_path, loss="k1", samples_per_prompt=2, reward_mix=0.5)
    with pytest.raises(ConfigError, match="4 rollouts are no multiple of samples_per_prompt 3"):
        trainer(tiny_model, tmp_path, samples_per_prompt=3)
    endpoint = EndpointTeacher("http://127.0.0.1:9", "teacher", retries=0)
    with pytest.raises(ConfigError, match="only its likeliest tokens; loss must be one of topk_forward_kl, k1"):
        trainer(tiny_model, tmp_path, teacher=endpoint)
    with pytest.raises(ConfigError, match="does not answer"):
        trainer(tiny_model, tmp_path, teacher=endpoint, loss="k1")
    wide = LlamaForCausalLM(
        LlamaConfig(vocab_size=999, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ConfigError, match=r"student's vocabulary has \d+ tokens and that of teacher 999"):
        trainer(tiny_model, tmp_path, teacher=wide)
    with pytest.raises(ConfigError, match=r"no column 'prompt'; it has \['question'\]"):
        OPDTrainer(
            model=load_model(tiny_model, "float32"),
            teacher_model=another(tiny_model),
            args=config(tmp_path),
            train_dataset=Dataset.from_list([{"question": "?"}]),
            processing_class=load_tokenizer(tiny_model),
        )


@pytest.mark.parametrize("build", ["tiny_idefics3", "tiny_llava"])
@pytest.mark.parametrize("several", [False, True], ids=["one teacher", "two teachers"])
def test_five_steps_on_images(build: str, several: bool, tmp_path: Path) -> None:
    """The pixels reach student and teachers, also when a batch is split among the latter."""
    from datasets import Dataset

    from deltalens.train.models import load_processor
    from deltalens.train.opd import OPDTrainer

    folder = getattr(vision_fixtures, build)(tmp_path / "model")
    examples = vision_fixtures.red_or_blue(8)
    teachers = {name: another(folder, seed) for name, seed in (("a", 1), ("b", 2))}
    run = OPDTrainer(
        model=load_model(folder, "float32"),
        teacher_model=teachers if several else teachers["a"],
        args=config(
            tmp_path / "run",
            max_steps=5,
            loss="topk_forward_kl",
            topk=32,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            teacher_column="domain" if several else None,
        ),
        train_dataset=Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": e.prompt}], "images": list(e.images), "domain": "ab"[i // 4]}
                for i, e in enumerate(examples)
            ]
        ),
        processing_class=load_processor(folder),
    )
    seen: list[int] = []
    for teacher in teachers.values():
        tower = next(module for name, module in teacher.named_modules() if name.endswith("patch_embedding"))
        tower.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[0]))
    before = [w.clone() for w in run.model.parameters()]
    run.train()
    losses = history(run, "loss")
    assert len(losses) == 5
    assert all(0 < value < 20 for value in losses)
    assert sum(seen) == 5 * 4, "each image goes through one teacher once a step"
    moved = [not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True)]
    assert sum(moved) > 0.8 * len(moved)
