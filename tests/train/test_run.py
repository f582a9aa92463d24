"""Training runs of every method on a tiny model: what they leave, that they learn, resume and stop."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from deltalens.errors import ConfigError, DeltalensError
from deltalens.train.config import load_config
from deltalens.train.contrasts import teacher_replies
from deltalens.train.evaluate import evaluate
from deltalens.train.guard import last_checkpoint
from deltalens.train.run import train
from deltalens.train.tasks import Sums

TINY = {
    "steps": 4, "prompts_per_step": 4, "warmup_steps": 1, "learning_rate": 1e-3, "checkpoint_every": 2, "bf16": False,
}  # fmt: skip


def config(method: str, model: Path, **changes: Any) -> Any:
    extra: dict[str, Any] = {"grpo": {"samples_per_prompt": 2}, "seqkd": {"teacher": str(model)}}.get(method, {})
    return load_config({"method": method, "model": str(model), **TINY, **extra, **changes})


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def sft(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sft"
    train(config("sft", tiny_model, save_master=True, snapshot_every=2), folder, quiet=True)
    return folder


@pytest.mark.parametrize("bf16", [True, False])
def test_a_run_says_where_bfloat16_is_slow(tiny_model: Path, tmp_path: Path, monkeypatch, capsys, bf16: bool) -> None:
    monkeypatch.setattr("deltalens.train.run.bfloat16_is_emulated", lambda: True)
    train(config("sft", tiny_model, steps=1, bf16=bf16), tmp_path / "run")
    assert ("no bfloat16 instructions here: `bf16: false` trains" in " ".join(capsys.readouterr().err.split())) is bf16


def test_a_run_leaves_everything_it_promises(sft: Path, tiny_model: Path) -> None:
    assert {path.name for path in sft.iterdir()} == {"manifest.json", "log.jsonl", "model", "master", "steps"}
    manifest = json.loads((sft / "manifest.json").read_text())
    assert manifest["finished"] is True
    assert manifest["config"]["learning_rate"] == 1e-3
    log = [json.loads(line) for line in (sft / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in log)
    master, model, source = weights(sft / "master"), weights(sft / "model"), weights(tiny_model)
    assert master.keys() == model.keys() == source.keys(), "tied weights stay one tensor"
    for name, tensor in master.items():
        assert tensor.dtype == np.float32
        assert (tensor.astype(ml_dtypes.bfloat16).view("uint16") == model[name].view("uint16")).all(), name
    assert any((model[name] != source[name]).any() for name in model)
    assert {path.name for path in (sft / "steps").iterdir()} == {"step-2", "step-4"}
    last = weights(sft / "steps" / "step-4")
    assert all((last[name].view("uint16") == model[name].view("uint16")).all() for name in model)
    for folder in ("model", "master"):
        dtype = json.loads((sft / folder / "config.json").read_text())["dtype"]
        assert dtype == {"model": "bfloat16", "master": "float32"}[folder]
    evaluate(sft / "model", Sums(), problems=2, max_new_tokens=2)


def test_a_finished_run_is_not_repeated_and_another_is_refused(
    sft: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("done already")

    monkeypatch.setattr("deltalens.train.run.build_trainer", never)
    again = train(config("sft", tiny_model, snapshot_every=2), sft, quiet=True)
    assert [row["step"] for row in again.log] == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match="another learning_rate; use --fresh"):
        train(config("sft", tiny_model, snapshot_every=2, learning_rate=1e-4), sft, quiet=True)
    with pytest.raises(ConfigError, match="another seed, data_blake3"):
        train(config("sft", tiny_model, snapshot_every=2, seed=1), sft, quiet=True)
    other = tmp_path / "model"
    shutil.copytree(tiny_model, other)
    (other / "generation_config.json").write_text('{"eos_token_id": 1}')
    with pytest.raises(ConfigError, match="another model_blake3"):
        train(config("sft", other, snapshot_every=2), sft, quiet=True)


@pytest.mark.parametrize("method", ["sft", "seqkd", "grpo", "opsd", "opd"])
def test_every_method_learns_from_where_a_killed_run_stopped(method: str, tiny_model: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {}
    if method == "opd":
        teacher = tmp_path / "teacher"
        train(config("sft", tiny_model, learning_rate=1e-2), teacher, quiet=True)
        changes = {"teacher": str(teacher / "model")}
    run = config(method, tiny_model, **changes)
    whole = train(run, tmp_path / "whole", quiet=True)
    assert len({row["loss"] for row in whole.log}) > 1 or method == "grpo"

    def cut(step: int, _steps: int, _loss: float) -> None:
        if step == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(run, tmp_path / "cut", quiet=True, on_step=cut)
    # A kill while a checkpoint is written leaves one without its last file.
    (tmp_path / "cut" / "checkpoints" / "checkpoint-3").mkdir()
    steps: list[int] = []
    resumed = train(run, tmp_path / "cut", quiet=True, on_step=lambda step, *_: steps.append(step))
    assert steps == [3, 4]
    timeless = [[{k: v for k, v in row.items() if "time" not in k and "per_s" not in k} for row in result.log]
                for result in (whole, resumed)]  # fmt: skip
    assert timeless[0] == timeless[1]
    expected = weights(whole.model)
    for name, tensor in weights(resumed.model).items():
        assert (tensor.view("uint16") == expected[name].view("uint16")).all(), name


def test_an_adapter_is_saved_and_merged(tiny_model: Path, tmp_path: Path) -> None:
    run = config("sft", tiny_model, learning_rate=1e-2, lora={"r": 2, "alpha": 4, "target_modules": ["q_proj"]})
    done = train(run, tmp_path / "run", quiet=True)
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    merged, source = weights(done.model), weights(tiny_model)
    assert merged.keys() == source.keys()
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    expected = source[f"{name}.weight"].astype(np.float32) + 2.0 * b.astype(np.float32) @ a.astype(np.float32)
    np.testing.assert_allclose(merged[f"{name}.weight"].astype(np.float32), expected, rtol=1e-2, atol=1e-4)
    assert np.abs(b).max() > 0
    assert (merged["model.layers.0.self_attn.k_proj.weight"] == source["model.layers.0.self_attn.k_proj.weight"]).all()


def test_teacher_replies_are_generated_once(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config("seqkd", tiny_model, temperature=0, max_new_tokens=3)
    examples, cache = Sums().train(3), tmp_path / "replies.jsonl"
    first = teacher_replies(run, tiny_model, examples, cache)
    assert [e.prompt for e in first] == [e.prompt for e in examples]
    generations = evaluate(tiny_model, _Fixed(examples), problems=3, max_new_tokens=3).generations
    assert [e.answer for e in first] == [g.reply for g in generations]
    monkeypatch.setattr("deltalens.train.contrasts.generate", None)
    assert teacher_replies(run, tiny_model, examples, cache) == first
    with pytest.raises(TypeError):  # other examples are generated anew
        teacher_replies(run, tiny_model, examples[:2], cache)


class _Fixed(Sums):
    def __init__(self, examples: list[Any]) -> None:
        object.__setattr__(self, "examples", examples)

    def test(self, count: int) -> list[Any]:
        return self.examples[:count]  # type: ignore[attr-defined]


def test_a_loss_that_is_no_number_names_step_batch_and_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    run = config("sft", tiny_model, steps=6, learning_rate=1e37, warmup_steps=0)
    with pytest.raises(DeltalensError, match=r"diverged at step \d.*batch of 4: .*Reply.*last good checkpoint") as stop:
        train(run, tmp_path / "run", quiet=True)
    assert "\n" not in str(stop.value)
    run = config("opsd", tiny_model, steps=6, learning_rate=1e37, warmup_steps=0)
    with pytest.raises(DeltalensError, match=r"diverged at step \d.*batch of 4: .*number only.*last good checkpoint"):
        train(run, tmp_path / "opsd", quiet=True)


def test_what_is_not_there_is_one_clear_line(tiny_model: Path, tmp_path: Path) -> None:
    for changes, said in (
        ({"task": "summs"}, "unknown task 'summs'"),
        ({"model": str(tmp_path / "absent")}, "is not a model folder"),
        ({"method": "opd", "teacher": str(tmp_path / "absent")}, "absent: is not a model folder"),
    ):
        run = load_config({"method": "sft", "model": str(tiny_model), **TINY, **changes})
        with pytest.raises(ConfigError, match=said):
            train(run, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_interrupted_it_saves_the_step_under_way(tiny_model: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom deltalens.train.config import load_config\n"
        "from deltalens.train.run import train\n"
        "def interrupt(step, *_):\n    if step == 1:\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "train(load_config(Path(sys.argv[1])), sys.argv[2], quiet=True, on_step=interrupt)\n"
    )
    file, folder = tmp_path / "run.yaml", tmp_path / "run"
    file.write_text(json.dumps({"method": "sft", "model": str(tiny_model), **TINY, "checkpoint_every": 4}))
    done = subprocess.run([sys.executable, "-c", script, str(file), str(folder)], capture_output=True, text=True)
    assert "KeyboardInterrupt" in done.stderr
    saved = last_checkpoint(folder / "checkpoints")
    assert saved is not None
    assert not (folder / "model").exists()


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "absent") is None
    for step, text in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"glob'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]


def test_a_vision_tower_can_be_frozen(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no vision tower"):
        train(config("sft", tiny_model, train_vision=False), tmp_path / "run", quiet=True)


def test_a_mask_confines_training_and_its_complement_keeps_its_bits(tiny_model: Path, tmp_path: Path) -> None:
    from deltalens.subnetwork import SubnetworkMask
    from deltalens.subnetwork.mask import source_hash

    rng = np.random.default_rng(0)
    source = weights(tiny_model)
    dense = {name: rng.random(tensor.shape) < 0.2 for name, tensor in source.items()}
    mask = SubnetworkMask.from_dense(dense, rule="test", source_hash=source_hash(tiny_model))
    mask.save(tmp_path / "a.mask")
    run = config("sft", tiny_model, learning_rate=1e-2, weight_decay=0.1, mask=str(tmp_path / "a.mask"))
    done = train(run, tmp_path / "run", quiet=True)
    assert all(row["grad_norm"] > 0 for row in done.log)
    trained = weights(done.model)
    for name, tensor in source.items():
        changed = tensor.view("uint16") != trained[name].view("uint16")
        assert not (changed & ~dense[name]).any(), name
        if tensor.ndim == 2:
            assert changed.sum() > 0.5 * dense[name].sum(), name
    mask.save(tmp_path / "again.mask")  # of other bytes: metadata has no order
    again = train(run.model_copy(update={"mask": str(tmp_path / "again.mask")}), tmp_path / "run", quiet=True)
    assert again.log == done.log
    (~mask).save(tmp_path / "rest.mask")
    with pytest.raises(ConfigError, match="mask_blake3"):
        train(run.model_copy(update={"mask": str(tmp_path / "rest.mask")}), tmp_path / "run", quiet=True)
    other = tmp_path / "other"
    shutil.copytree(done.model, other)
    with pytest.raises(DeltalensError, match="made for another source"):
        train(config("sft", other, mask=str(tmp_path / "a.mask")), tmp_path / "refused", quiet=True)
    with pytest.raises(ConfigError, match=r"mask .*absent: cannot be read"):
        train(config("sft", tiny_model, mask=str(tmp_path / "absent")), tmp_path / "refused", quiet=True)


def test_a_mask_of_everything_is_dense_training(tiny_model: Path, tmp_path: Path) -> None:
    """Compact AdamW without a mask, reached by no momentum at beta1 0, against transformers' own AdamW."""
    dense = train(config("sft", tiny_model, trainer={"adam_beta1": 0.0}), tmp_path / "dense", quiet=True)
    compact = train(config("sft", tiny_model, optimizer="adamw-no-momentum"), tmp_path / "compact", quiet=True)
    for one, other in zip(dense.log, compact.log, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "rmsprop", "lion", "muon"])
def test_every_optimizer_trains(optimizer: str, tiny_model: Path, tmp_path: Path) -> None:
    done = train(config("sft", tiny_model, optimizer=optimizer), tmp_path / "run", quiet=True)
    source, trained = weights(tiny_model), weights(done.model)
    assert any((source[name] != trained[name]).any() for name in source)


def test_a_projection_confines_the_update_to_a_subspace(tiny_model: Path, tmp_path: Path) -> None:
    early = train(config("sft", tiny_model, learning_rate=1e-2), tmp_path / "early", quiet=True)
    run = config("sft", tiny_model, optimizer="sgd", learning_rate=0.5, save_master=True,
                 project={"update": str(early.model), "k": 2})  # fmt: skip
    train(run, tmp_path / "run", quiet=True)
    name = "model.layers.0.mlp.up_proj.weight"
    delta = weights(tmp_path / "run" / "master")[name] - weights(tiny_model)[name].astype(np.float32)
    values = np.linalg.svd(delta, compute_uv=False)
    assert values[1] > 0
    assert values[2] < 1e-4 * values[0], "the update has the projection's rank"


def test_the_supervised_loss_is_the_answers_cross_entropy(tiny_model: Path, tmp_path: Path) -> None:
    """A batch of everything against a float64 twin: the mean over the tokens of all answers, prompts left out."""
    from deltalens.train.data import rows
    from deltalens.train.models import load_model, load_tokenizer

    done = train(config("sft", tiny_model, steps=1, prompts_per_step=16), tmp_path / "run", quiet=True)
    tokenizer, model = load_tokenizer(tiny_model), load_model(tiny_model, "float32").double()
    total = tokens = 0.0
    for row in rows(Sums().train(16), completions=True):
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        answer = torch.tensor(ids[len(prompt) :])
        total += torch.nn.functional.cross_entropy(logits, answer, reduction="sum").item()
        tokens += len(answer)
    assert done.log[0]["loss"] == pytest.approx(total / tokens, rel=1e-5)
