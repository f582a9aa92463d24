"""Study files: what is refused and how it is said, names, scales, the packaged studies."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from study_fixtures import small_study

from deltalens.errors import ConfigError
from deltalens.study import Outcome, load_study, packaged_studies, plan, select
from deltalens.study.plan import model_of
from deltalens.study.spec import expand, instance_of


@pytest.mark.parametrize(
    "name", ["smollm2-sums", "easyvqa-vlm", "paper-ds-qwen", "paper-qwen2.5-vl", "paper-qwen3-opsd"]
)
def test_packaged_studies_can_be_planned(name: str) -> None:
    """Every config of every scale is one that `deltalens train` takes, and every claim is about runs that there are."""
    study = load_study(name)
    assert name in packaged_studies()
    for scale in ("full", *study.scales):
        loaded = load_study(name, scale)
        made = plan(loaded)
        assert {f"train:{one.name}" for one in expand(loaded) if loaded.runs[one.run].checkpoint is None} <= set(
            made.steps
        )
        Outcome(loaded, {}).check_references(study)
    assert study.claims
    grouped = set().union(*(select(plan(study), group) for group in study.groups))
    assert grouped == set(plan(study).steps)  # every step is in a sitting, or --results would not say whose it is


def test_steps_come_after_what_they_rest_on() -> None:
    made = plan(load_study(small_study()))
    order = list(made.steps)
    for step in made.steps.values():
        assert all(order.index(parent) < order.index(step.id) for parent in step.parents)
    assert made.steps["train:random-s0"].parents == ("train:teacher-s0", "mask:random-s0")
    assert set(made.steps["train:sgd-best-s1"].parents) == {"train:teacher-s0", "eval:sgd-0.1-s0", "eval:sgd-0.3-s0"}
    assert made.steps["mask:opd-mask-s1"].parents == ("train:opd-s1",)  # of its own seed


def test_names() -> None:
    study = load_study(small_study())
    assert [one.name for one in expand(study)] == [
        "teacher-s0", "opd-s0", "opd-s1", "opd-mask-s0", "opd-mask-s1", "random-s0", "sgd-0.1-s0", "sgd-0.3-s0",
        "sgd-best-s1",
    ]  # fmt: skip
    assert instance_of(study, "opd", 1).name == "opd-s1"
    assert instance_of(study, "teacher", 1).name == "teacher-s0"  # its first, where it has no such seed
    assert model_of(study, "teacher@4").spec == "runs/teacher-s0/steps/step-4"
    assert model_of(study, "Qwen/Qwen3-4B@main").step is None
    with pytest.raises(ConfigError, match=r"name one: sgd-0\.1-s0"):
        instance_of(study, "sgd")


def test_mask_like_a_run_without_one_takes_its_visible_update() -> None:
    content = small_study()
    content["runs"]["random"]["mask"] = {"select": "random", "like": "opd"}
    made = plan(load_study(content))
    assert made.steps["mask:random-s0"].parents == ("mask:opd-s0",)
    assert made.steps["mask:opd-s0"].config["select"] == "visible"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trajectorys": []}, "did you mean trajectories"),
        ({"evaluate": {"problem": 3}}, "did you mean problems"),
        ({"trajectories": ["opdd"]}, "did you mean opd"),
        ({"groups": {"a": ["teachr"]}}, "did you mean teacher"),
        ({"runs": {"a": {"seeds": [0]}}}, "either a method"),
        ({"runs": {"a": {"method": "sft", "best_seeds": [1]}}}, "no rates"),
        ({"name": "../up"}, "name"),
        ({"claims": [{"id": "x", "text": "x", "rule": "over", "seen": "a", "chance": 0}]}, "rule"),
    ],
)
def test_mistakes_are_said(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_study(small_study(**changes))


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (
            {"method": "opd", "teacher": "teacher", "learning_rat": 1e-5},
            "run x-s0: unknown key 'learning_rat'; did you",
        ),
        ({"method": "opdd"}, "method is 'opdd'"),
        ({"method": "opd", "teacher": "teacher", "mask": {"from": "oped"}}, "no run 'oped'; did you mean opd"),
        (
            {"method": "opd", "teacher": "teacher", "mask": {"select": "vissible", "from": "opd"}},
            "did you mean visible",
        ),
        ({"method": "opd", "teacher": "teacher@end"}, "teacher@300"),
    ],
)
def test_mistakes_in_runs_are_said(run: dict[str, Any], said: str) -> None:
    content = small_study()
    content["runs"]["x"] = run
    with pytest.raises(ConfigError, match=said):
        plan(load_study(content))


def test_circle_is_said() -> None:
    content = small_study()
    content["runs"] = {
        "a": {"method": "opd", "teacher": "b"},
        "b": {"method": "opd", "teacher": "x/y", "mask": {"from": "a"}},
    }
    for key in ("comparisons", "trajectories", "groups", "tables", "claims", "scales", "evaluate"):
        del content[key]
    with pytest.raises(ConfigError, match=r"in a circle: (a → b → a|b → a → b)"):
        plan(load_study(content))


def test_comparison_needs_one_source() -> None:
    content = small_study(comparisons={"pair": ["opd-s0", "other"]})
    content["runs"]["other"] = {"method": "sft", "model": "teacher@4"}
    with pytest.raises(ConfigError, match="do not all start from one model"):
        plan(load_study(content))


def test_scale_keeps_what_it_names() -> None:
    study = load_study(small_study(), "tiny")
    assert study.name == "small-tiny"
    assert list(study.runs) == ["teacher", "opd"]
    assert study.tables.subnetwork == ["opd"]
    assert study.groups == {"first": ["teacher", "opd"]}
    assert plan(study).steps["train:opd-s0"].config["steps"] == 2
    assert len(study.claims) == 3  # those without their runs are shown as not run
    with pytest.raises(ConfigError, match="it has full, tiny"):
        load_study(small_study(), "huge")


def test_claims_about_no_run_are_refused() -> None:
    content = small_study()
    content["claims"][1]["seen"] = "eval:opd-maks:accuracy"
    study = load_study(content)
    with pytest.raises(ConfigError, match=r"claim mask: .*did you mean opd-mask"):
        Outcome(study, {}).check_references()
    with pytest.raises(ConfigError, match="write KIND:RUN:KEY"):
        Outcome(study, {}).values("accuracy of opd")


def test_only() -> None:
    made = plan(load_study(small_study()))
    assert select(made, "opd-s1") == {"train:opd-s1", "eval:opd-s1", "eval:opd-s1@2", "analyze:opd-s1"}
    assert select(made, "pair") == {"compare:pair"}
    assert "eval:source" in select(made, "first")
    with pytest.raises(ConfigError, match="did you mean random"):
        select(made, "randm")


def test_file(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(small_study()))
    assert load_study(file).name == "small"
    file.write_text("- a list")
    with pytest.raises(ConfigError, match=r"my\.yaml: must hold keys"):
        load_study(file)
    with pytest.raises(ConfigError, match="smollm2-sums"):
        load_study("smollm2")
