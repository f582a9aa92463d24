"""A study on a tiny random model: everything is really trained and measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from deltalens.errors import ConfigError
from deltalens.patch import pack
from deltalens.study import Outcome, Runner, load_study, write_pages
from deltalens.study.steps import restore, run_config
from deltalens.subnetwork import SubnetworkMask
from deltalens.train.run import train


@pytest.mark.parametrize("emulated", [True, False])
def test_precision_is_what_the_processor_is_good_at(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulated: bool
) -> None:
    """Not where the study says which, nor where a run was begun elsewhere; the hash knows nothing of it."""
    monkeypatch.setattr("deltalens.train.models.bfloat16_is_emulated", lambda: emulated)
    study = load_study(
        {
            "name": "tiny",
            "source": str(tiny_model),
            "task": "sums",
            "defaults": {"steps": 1, "prompts_per_step": 2, "max_new_tokens": 2, "warmup_steps": 0},
            "runs": {
                "teacher": {"method": "sft"},
                "opd": {"method": "opd", "teacher": "teacher"},
                "said": {"method": "sft", "bf16": True},
                "narrow": {"method": "sft", "weights": "bfloat16"},
            },
            "evaluate": {"problems": 2, "max_new_tokens": 2},
        }
    )
    runner = Runner(study, tmp_path)
    steps = runner.plan.steps
    assert run_config(steps["train:opd-s0"], tmp_path).bf16 is not emulated
    assert run_config(steps["train:opd-s0"], tmp_path).teacher_dtype == ("float32" if emulated else "bfloat16")
    assert run_config(steps["train:said-s0"], tmp_path).bf16
    assert run_config(steps["train:narrow-s0"], tmp_path).bf16
    runner.run("teacher")
    record = runner.records["train:teacher-s0"]
    assert record["numbers"]["autocast"] == (None if emulated else "bfloat16")
    monkeypatch.setattr("deltalens.train.models.bfloat16_is_emulated", lambda: not emulated)
    assert run_config(steps["train:teacher-s0"], tmp_path).bf16 is not emulated
    assert Runner(study, tmp_path).current("train:teacher-s0")


def test_study_of_a_tiny_model(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content: dict[str, Any] = {
        "name": "tiny",
        "source": str(tiny_model),
        "task": "sums",
        "defaults": {"steps": 2, "prompts_per_step": 2, "learning_rate": 1e-2, "max_new_tokens": 2, "warmup_steps": 0},
        "runs": {
            "teacher": {"method": "sft"},
            "opd": {"method": "opd", "teacher": "teacher", "snapshot_every": 1, "geometry_every": 1},
            "masked": {"method": "opd", "teacher": "teacher", "mask": {"select": "first:1", "from": "opd"}},
            "random": {"method": "sft", "mask": {"select": "random", "like": "opd"}},
        },
        "evaluate": {"problems": 4, "max_new_tokens": 2, "curves": ["opd"], "steps": [1], "curve_problems": 2},
        "analyze": {"null_draws": 1, "compare_draws": 1},
        "comparisons": {"pair": ["opd", "teacher"]},
        "trajectories": ["opd"],
        "tables": {"main": ["opd"], "subnetwork": ["opd", "masked", "random"]},
        "claims": [
            {"id": "overlap", "text": "overlap", "rule": "above", "spread": 0.0, "chance": 0.0,
             "seen": "compare:pair/opd>teacher:a_in_b"},
        ],
    }  # fmt: skip
    study = load_study(content)
    made = Runner(study, tmp_path)
    made.run()
    numbers = made.numbers()
    assert set(numbers) == set(made.plan.steps)
    assert numbers["analyze:opd-s0"]["stable_rank_null"]["mean"] > 0
    assert 0 < numbers["mask:masked-s0"]["density"] <= 1
    assert numbers["mask:random-s0"]["density"] == pytest.approx(1 - numbers["analyze:opd-s0"]["sparsity"], abs=1e-3)
    assert numbers["train:opd-s0"]["diagnostics"]["rms_variation"]["mean"] > 0
    assert [one["step"] for one in numbers["trajectory:opd-s0"]["checkpoints"]] == [1, 2]
    assert {one["a"] for one in numbers["compare:pair"]["pairs"]} <= {"opd-s0", "teacher-s0"}
    outcome = Outcome(study, numbers)
    assert outcome.verdict(study.claims[0]).verdict == "reproduced"
    write_pages(outcome, tmp_path, {"command": "x", "versions": [], "outdated": []})

    # A mask is known by its bits, whatever the order of its file's metadata.
    SubnetworkMask.load(tmp_path / "masks" / "masked-s0.mask").save(tmp_path / "other.mask")
    assert SubnetworkMask.load(tmp_path / "other.mask").content_hash() == made.records["mask:masked-s0"]["output"]
    assert (
        SubnetworkMask.load(tmp_path / "masks" / "random-s0.mask").content_hash()
        != made.records["mask:masked-s0"]["output"]
    )

    # A patch of the teacher gives its model back, and nothing is trained.
    pack(tiny_model, tmp_path / "runs" / "teacher-s0" / "model", tmp_path / "teacher-s0.patch")
    output = made.records["train:teacher-s0"]["output"]
    restore(made.plan.steps["train:teacher-s0"], tmp_path / "elsewhere", tmp_path / "teacher-s0.patch", output)
    with pytest.raises(ConfigError, match="gives another model"):
        restore(made.plan.steps["train:teacher-s0"], tmp_path / "again", tmp_path / "teacher-s0.patch", "x")

    # What lies there is taken over where its record is lost: nothing is trained or generated again.
    for file in (tmp_path / "records").iterdir():
        file.unlink()
    manifest = tmp_path / "runs" / "teacher-s0" / "manifest.json"
    older = json.loads(manifest.read_text())
    del older["config"]["optimizer"]  # as a version before that key would have written it
    manifest.write_text(json.dumps(older))

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("deltalens.train.run.build_trainer", never)
    monkeypatch.setattr("deltalens.train.evaluate.generate", never)
    asked = run_config(made.plan.steps["train:opd-s0"], tmp_path)
    for every in (None, 2):  # it has every snapshot
        train(asked.model_copy(update={"snapshot_every": every}), tmp_path / "runs" / "opd-s0", quiet=True)
    teacher = run_config(made.plan.steps["train:teacher-s0"], tmp_path)
    with pytest.raises(ConfigError, match="another snapshot_every"):
        train(teacher.model_copy(update={"snapshot_every": 1}), tmp_path / "runs" / "teacher-s0", quiet=True)
    again = Runner(study, tmp_path)
    again.run()
    assert again.numbers().keys() == numbers.keys()
    assert {step: record["hash"] for step, record in again.records.items()} == {
        step: record["hash"] for step, record in made.records.items()
    }
