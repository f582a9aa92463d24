"""The geometry callback on a tiny model: its numbers are the analysis', and training does not notice it."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from callback_fixtures import Recorder, make_trainer, save_rounded
from transformers import AutoModelForImageTextToText, LlamaForCausalLM, TrainerCallback
from vision_fixtures import tiny_idefics3, tiny_llava

import deltalens
from deltalens import UpdateGeometryCallback
from deltalens.checkpoint import open_checkpoint, pair_checkpoints
from deltalens.errors import CheckpointError, ConfigError, DeltalensError
from deltalens.train.live_weights import LiveWeights, live_tensors
from deltalens.train.models import quiet_libraries


def whole_model(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "geometry.parquet").filter(pl.col("scope") == "global")


def right_subspaces(source: Path, trained: Path) -> dict[str, np.ndarray]:
    before, after = (LlamaForCausalLM.from_pretrained(p, dtype=torch.bfloat16).state_dict() for p in (source, trained))
    out = {}
    for name, weight in before.items():
        if weight.ndim == 2 and name != "lm_head.weight":
            delta = (after[name] - weight).double().numpy()
            out[name] = np.linalg.svd(delta, full_matrices=False)[2][:16].T
    return out


def test_logged_numbers_are_the_analysis_of_saved_checkpoints(tiny_model: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    callback = UpdateGeometryCallback(tiny_model, every=2)
    trainer = make_trainer(tiny_model, tmp_path / "run", [recorder, callback])
    trainer.train()
    table = pl.read_parquet(tmp_path / "run" / "geometry.parquet")
    assert table["step"].unique().sort().to_list() == [2, 4, 6]
    assert table.select("step", "scope", "key").is_unique().all()
    first = None
    for step in (2, 4, 6):
        rounded = save_rounded(tmp_path / "run" / f"checkpoint-{step}", tmp_path / f"rounded-{step}")
        summary = deltalens.analyze(tiny_model, rounded).summary
        expected, rows = summary["global"], table.filter(pl.col("step") == step)
        (row,) = rows.filter(pl.col("scope") == "global").to_dicts()
        for name in ("tensors", "parameters", "visible_updates", "sparsity", "unchanged_fraction", "relative_norm"):
            assert row[name] == expected[name], name
        assert 0.05 < row["sparsity"] < 0.95, "the test must see a sparse update"
        for name in ("stable_rank", "top16_energy"):
            for how in ("mean", "median"):
                assert row[f"{name}_{how}"] == pytest.approx(expected[name][how], rel=1e-2), (name, how)
        for name in ("low_magnitude_coverage_10pct", "low_magnitude_coverage_10pct_core"):
            assert row[name] == expected[name]["pooled"]
            for part in ("random", "null", "excess"):
                assert row[f"{name}_{part}"] == expected[name][part]
        for key, values in summary["by_role"].items():
            (role,) = rows.filter((pl.col("scope") == "role") & (pl.col("key") == key)).to_dicts()
            assert role["energy_share"] == pytest.approx(values["energy_share"], rel=1e-12)
            assert role["sparsity"] == values["sparsity"]
        assert set(rows.filter(pl.col("scope") == "layer")["key"]) == set(summary["by_layer"])
        subspaces = right_subspaces(tiny_model, rounded)
        first = first or subspaces
        similar = [np.linalg.norm(first[name].T @ now) ** 2 / now.shape[1] for name, now in subspaces.items()]
        assert row["sim16_first_mean"] == pytest.approx(np.mean(similar), abs=0.01)
    assert row["sim16_first_mean"] < 0.99, "the last subspace is not the first one"
    (logged,) = [entry for entry in trainer.state.log_history if entry["step"] == 6 and "geometry/sparsity" in entry]
    (told,) = [entry for entry in recorder.seen if entry["step"] == 6 and "geometry/sparsity" in entry]
    assert logged == told
    assert logged["geometry/relative_norm"] == row["relative_norm"]
    shares = [value for name, value in logged.items() if name.startswith("geometry/energy_share/")]
    assert sum(shares) == pytest.approx(1.0)
    # The trainer's own entries come as often as without it.
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [3, 6]


def test_training_does_not_notice(tiny_model: Path, tmp_path: Path) -> None:
    class Dice(TrainerCallback):
        """Training that draws from every global generator at each step."""

        def __init__(self) -> None:
            self.rolled: list[Any] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.rolled.append((torch.rand(1).item(), np.random.rand(), random.random(), torch.get_num_threads()))

    runs = []
    for callbacks in ((), (UpdateGeometryCallback(every=1, at_start=True),)):
        dice = Dice()
        trainer = make_trainer(tiny_model, tmp_path / str(len(runs)), [dice, *callbacks])
        trainer.train()
        curve = [
            {k: v for k, v in entry.items() if not k.startswith("train_")}
            for entry in trainer.state.log_history
            if "geometry/sparsity" not in entry
        ]
        runs.append((dice.rolled, curve, trainer.model.state_dict()))
    assert runs[0][:2] == runs[1][:2]
    for name, weight in runs[0][2].items():
        assert torch.equal(weight, runs[1][2][name]), name
    assert whole_model(tmp_path / "1")["step"].to_list() == list(range(7))
    assert whole_model(tmp_path / "1")["sparsity"][0] == 1.0


def test_diagnostics_are_of_the_moments_before_the_step_and_its_gradient(tiny_model: Path, tmp_path: Path) -> None:
    seen: dict[int, tuple[float, float]] = {}

    class Hand(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            moments = [(p, kwargs["optimizer"].state[p]) for p in kwargs["model"].parameters()]
            if moments[0][1]:
                m, v = (torch.cat([s[k].flatten() for _, s in moments]).double() for k in ("exp_avg", "exp_avg_sq"))
                g = torch.cat([p.grad.flatten() for p, _ in moments]).double()
                root = v.sqrt()
                cosine = torch.nn.functional.cosine_similarity(m, g, dim=0).item()
                seen[state.global_step + 1] = (cosine, (root.std(correction=0) / root.mean()).item())

    make_trainer(tiny_model, tmp_path, [UpdateGeometryCallback(tiny_model, steps=[1, 2, 5]), Hand()]).train()
    table = whole_model(tmp_path)
    assert table["step"].to_list() == [1, 2, 5]
    assert table["momentum_gradient_cosine"][0] is None
    for row in table.to_dicts()[1:]:
        cosine, variation = seen[row["step"]]
        assert row["momentum_gradient_cosine"] == pytest.approx(cosine, rel=1e-5)
        assert row["rms_variation"] == pytest.approx(variation, rel=1e-5)


def test_an_optimizer_may_say_its_diagnostics_itself(tiny_model: Path, tmp_path: Path) -> None:
    class Flat(torch.optim.SGD):
        def diagnostics(self) -> dict[str, float]:
            return {"momentum_gradient_cosine": 0.25, "rms_variation": 3.0}

    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    trainer = make_trainer(tiny_model, tmp_path, [UpdateGeometryCallback(tiny_model, every=6)], model=model)
    trainer.optimizer = Flat(model.parameters(), lr=1e-3)
    trainer.train()
    (row,) = whole_model(tmp_path).to_dicts()
    assert (row["momentum_gradient_cosine"], row["rms_variation"]) == (0.25, 3.0)


def test_a_resumed_run_has_the_same_source_and_no_row_twice(tiny_model: Path, tmp_path: Path) -> None:
    make_trainer(tiny_model, tmp_path / "whole", [UpdateGeometryCallback(every=1)]).train()

    class Cut(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tiny_model, tmp_path / "cut", [UpdateGeometryCallback(every=1), Cut()]).train()
    assert whole_model(tmp_path / "cut")["step"].to_list() == [1, 2, 3, 4, 5]
    trainer = make_trainer(tiny_model, tmp_path / "cut", [UpdateGeometryCallback(every=1)])
    with quiet_libraries():
        trainer.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    whole, cut = (pl.read_parquet(tmp_path / name / "geometry.parquet") for name in ("whole", "cut"))
    assert cut.equals(whole)
    # A snapshot is a checkpoint that can be analysed, in bf16 since the model started from there.
    result = deltalens.analyze(tmp_path / "cut" / "geometry_source", tiny_model)
    assert result.summary["global"]["unchanged_bits"] == 1.0
    assert not result.summary["skipped"]
    # Begun anew in the same folder, it leaves nothing of the earlier run.
    make_trainer(tiny_model, tmp_path / "cut", [UpdateGeometryCallback(every=3)], max_steps=3).train()
    assert whole_model(tmp_path / "cut")["step"].to_list() == [3]


def test_a_resumed_run_without_its_snapshot_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    make_trainer(tiny_model, tmp_path, max_steps=2).train()
    trainer = make_trainer(tiny_model, tmp_path, [UpdateGeometryCallback()])
    with quiet_libraries(), pytest.raises(ConfigError, match=r"geometry_source.*resumed at step 2.*give"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_weights_finer_than_bf16_are_kept_as_they_are(tiny_model: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight += 1e-4
    make_trainer(tiny_model, tmp_path, [UpdateGeometryCallback(every=6)], model=model).train()
    from safetensors import safe_open

    with safe_open(tmp_path / "geometry_source" / "part-00000.safetensors", "pt") as snapshot:
        kept = {name: snapshot.get_tensor(name) for name in snapshot.keys()}  # noqa: SIM118
    assert {name for name, tensor in kept.items() if tensor.dtype == torch.float32} == {"model.norm.weight"}


@pytest.mark.parametrize("start", [True, False])
def test_an_adapter_is_measured_merged(start: bool, tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
    model = get_peft_model(model, lora)
    callback = UpdateGeometryCallback("start" if start else tiny_model, every=3, output=tmp_path / "geometry")
    make_trainer(tiny_model, tmp_path, [callback], model=model, learning_rate=2e-2).train()
    model.save_pretrained(tmp_path / "adapter")
    settings = deltalens.Settings(compare_dtype="bf16")
    expected = deltalens.analyze(tiny_model, tmp_path / "adapter", settings=settings).summary
    row = whole_model(tmp_path / "geometry").to_dicts()[-1]
    assert row["tensors"] == expected["global"]["tensors"]
    # Two libraries' products B · A may differ in the last bit, and with it a rounding here and there.
    assert row["visible_updates"] == pytest.approx(expected["global"]["visible_updates"], abs=3)
    assert 0 < row["visible_updates"] < row["parameters"]
    assert row["relative_norm"] == pytest.approx(expected["global"]["relative_norm"], rel=1e-4)
    assert row["stable_rank_median"] == pytest.approx(expected["global"]["stable_rank"]["median"], rel=1e-2)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_names_are_those_of_files_through_every_wrapper(tiny_model: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = LlamaForCausalLM.from_pretrained(tiny_model)
    names = set(live_tensors(model))
    assert "lm_head.weight" not in names, "a tied head counts once"
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"])
    )
    assert set(live_tensors(adapted)) == names
    live = live_tensors(adapted)["model.embed_tokens.weight"]
    module = adapted.base_model.model.model.embed_tokens
    torch.nn.init.normal_(module.lora_embedding_B["default"])
    merged = live.gather(wanted=True)
    assert merged is not None
    torch.testing.assert_close(merged, module.base_layer.weight.float() + module.get_delta_weight("default").float())


@pytest.mark.parametrize("make", [tiny_idefics3, tiny_llava])
def test_every_tensor_of_a_vision_language_model_is_measured(make: Any, tmp_path: Path) -> None:
    """Loaded, such a model names its tensors otherwise than its files do."""
    folder = make(tmp_path / "model")
    with quiet_libraries():
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with open_checkpoint(folder) as source:
        pairing = pair_checkpoints(source, LiveWeights(model, main=True).as_checkpoint())
        assert len(pairing.pairs) == len(source.entries)
    assert not [skipped for skipped in pairing.skipped if "tied" not in skipped.reason]
    assert {pair.role.split(".")[0] for pair in pairing.pairs} >= {"vision", "ffn", "attention", "norm"}


def test_what_cannot_be_measured_is_refused_in_a_line(tiny_model: Path, tmp_path: Path) -> None:
    from peft import IA3Config, LoraConfig, get_peft_model

    for wrong in ({"every": 0}, {"steps": [0, 4]}, {"threshold": -1.0}):
        with pytest.raises(ConfigError, match="UpdateGeometryCallback"):
            UpdateGeometryCallback(**wrong)
    with pytest.raises(CheckpointError, match="no such file"):
        make_trainer(tiny_model, tmp_path, [UpdateGeometryCallback(tmp_path / "absent" / "folder")]).train()
    for config in (
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    ):
        adapted = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model), config)
        with pytest.raises(DeltalensError, match="no plain LoRA"):
            live_tensors(adapted)
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    next(iter(model.parameters())).ds_id = 0
    with pytest.raises(ConfigError, match="ZeRO"):
        live_tensors(model)
