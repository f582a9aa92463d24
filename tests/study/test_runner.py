"""The runner with stand-ins for the steps: skip, resume, redo, committed records, the pages."""

import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from study_fixtures import Stub, small_study
from typer.testing import CliRunner

from deltalens.errors import ConfigError
from deltalens.study import Outcome, Runner, load_study, write_pages

MADE = {"command": "deltalens study small", "versions": ["deltalens 0"], "outdated": []}


def runner(folder: Path, stub: Stub, content: dict[str, Any] | None = None, **more: Any) -> Runner:
    return Runner(load_study(content or small_study()), folder, perform=stub, **more)


def test_everything_once_then_nothing(tmp_path: Path) -> None:
    first = Stub()
    made = runner(tmp_path, first).run()
    assert made == first.calls
    assert sorted(made) == sorted(runner(tmp_path, Stub()).plan.steps)
    again = Stub()
    assert runner(tmp_path, again).run() == []
    assert again.calls == []


def test_killed_and_resumed(tmp_path: Path) -> None:
    cut = Stub(stop_at="mask:opd-mask-s1")
    with pytest.raises(KeyboardInterrupt):
        runner(tmp_path, cut).run()
    rest = Stub()
    runner(tmp_path, rest).run()
    assert not set(cut.calls) & set(rest.calls)
    assert set(cut.calls) | set(rest.calls) == set(runner(tmp_path, Stub()).plan.steps)


def test_record_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    runner(tmp_path, Stub()).run("teacher")
    (tmp_path / "records" / "train-teacher-s0.json").write_text('{"hash": "x"')
    with pytest.raises(ConfigError, match=r"train-teacher-s0\.json: is no record"):
        runner(tmp_path, Stub())


def test_changed_config_is_made_again_with_what_rests_on_it(tmp_path: Path) -> None:
    runner(tmp_path, Stub()).run()
    content = small_study()
    content["runs"]["random"]["learning_rate"] = 3e-5
    redo = Stub(outputs=lambda step: f"again {step}")
    changed = runner(tmp_path, redo, content)
    assert changed.outdated() == ["train:random-s0"]  # what rests on it has its old parent's hash still
    changed.run()
    assert redo.calls == ["train:random-s0", "eval:random-s0", "analyze:random-s0"]


def test_parent_that_comes_out_the_same_changes_nothing_below(tmp_path: Path) -> None:
    runner(tmp_path, Stub()).run()
    content = small_study()
    content["runs"]["random"]["learning_rate"] = 3e-5
    redo = Stub()
    runner(tmp_path, redo, content).run()
    assert redo.calls == ["train:random-s0"]


def test_measurements_of_other_inputs_are_removed_and_runs_are_not(tmp_path: Path) -> None:
    runner(tmp_path, Stub()).run()
    content = small_study(evaluate={"problems": 11, "curves": ["opd"], "steps": [2], "curve_problems": 5})
    seen = []

    class Look(Stub):
        def __call__(self, step: Any, folder: Path, *, rate: float | None, quiet: bool) -> Any:
            seen.append((step.id, (folder / "evals" / f"{step.name}.json").exists()))
            return super().__call__(step, folder, rate=rate, quiet=quiet)

    runner(tmp_path, Look(), content).run()
    assert seen
    assert all(step.startswith("eval:") and not there for step, there in seen)
    assert (tmp_path / "runs" / "opd-s0" / "model" / "config.json").exists()


def test_only_makes_what_it_rests_on_and_no_more(tmp_path: Path) -> None:
    stub = Stub()
    runner(tmp_path, stub).run("random-s0")
    assert stub.calls == [
        "train:teacher-s0", "train:opd-s0", "mask:opd-mask-s0", "mask:random-s0", "train:random-s0", "eval:random-s0",
        "analyze:random-s0",
    ]  # fmt: skip


def test_best_rate(tmp_path: Path) -> None:
    stub = Stub()
    made = runner(tmp_path, stub)
    made.run("sgd")
    assert stub.rates["train:sgd-best-s1"] == 0.3
    assert stub.rates["train:sgd-0.1-s0"] is None
    assert made.current("train:sgd-best-s1")


def test_committed_records_stand_for_runs(tmp_path: Path) -> None:
    here, there, results = tmp_path / "here", tmp_path / "there", tmp_path / "results"
    done = runner(here, Stub())
    done.run()
    files = done.commit(results, "deltalens study small")
    assert [file.name for file in files] == ["first.json", "masks.json", "rest.json"]
    stub = Stub()
    assert runner(there, stub, results=results).run() == []
    assert not there.exists()
    # A new run of another machine: what it reads is made again, and nothing else.
    content = small_study()
    content["runs"]["new"] = {"method": "opd", "teacher": "teacher"}
    runner(there, stub, content, results=results).run()
    assert stub.calls == ["train:teacher-s0", "train:new-s0", "eval:new-s0", "analyze:new-s0"]


def test_patch_stands_for_a_trained_model(tmp_path: Path) -> None:
    results = tmp_path / "results"
    done = runner(tmp_path / "here", Stub())
    done.run()
    done.commit(results, "x")
    (results / "teacher-s0.patch").write_text("x")
    restored = []

    def restore(step: Any, folder: Path, patch: Path, output: str) -> None:
        restored.append((step.id, patch.name, output))
        (folder / "runs" / step.name / "model").mkdir(parents=True)
        (folder / "runs" / step.name / "model" / "config.json").write_text("{}")

    stub = Stub()
    content = small_study()
    content["runs"]["new"] = {"method": "opd", "teacher": "teacher"}
    runner(tmp_path / "there", stub, content, results=results, restore=restore).run()
    assert restored == [("train:teacher-s0", "teacher-s0.patch", "made train:teacher-s0")]
    assert stub.calls == ["train:new-s0", "eval:new-s0", "analyze:new-s0"]


def test_parent_of_another_machine_has_its_children_made_again(tmp_path: Path) -> None:
    results = tmp_path / "results"
    done = runner(tmp_path / "here", Stub())
    done.run()
    done.commit(results, "x")
    stub = Stub(outputs=lambda step: f"other {step}")
    content = small_study()
    content["runs"]["new"] = {"method": "opd", "teacher": "teacher"}
    again = runner(tmp_path / "there", stub, content, results=results)
    again.run()
    assert "train:opd-s0" in stub.calls  # its teacher is another one now
    assert again.outdated() == []


def test_committed_records_are_not_lost_to_a_parent_of_another_machine(tmp_path: Path) -> None:
    results = tmp_path / "results"
    done = runner(tmp_path / "here", Stub())
    done.run()
    files = done.commit(results, "x")
    before = [file.read_text() for file in files]
    other = runner(tmp_path / "there", Stub(outputs=lambda step: f"another {step}"), results=results)
    other._make(other.plan.steps["train:teacher-s0"], "1/1", [])
    with pytest.raises(ConfigError, match=r"train:teacher-s0 was made again in .*there.*committed records would be"):
        other.commit(results, "x")
    assert [file.read_text() for file in files] == before
    other.run()  # whole again, with other outputs: nothing is lost
    other.commit(results, "x")


def test_numbers_of_outdated_steps_are_left_out(tmp_path: Path) -> None:
    runner(tmp_path, Stub()).run()
    content = small_study()
    content["runs"]["random"]["learning_rate"] = 3e-5
    changed = runner(tmp_path, Stub(), content)
    assert "train:random-s0" not in changed.numbers()
    assert "train:opd-s0" in changed.numbers()


def test_pages(tmp_path: Path) -> None:
    made = runner(tmp_path, Stub())
    made.run()
    outcome = Outcome(made.study, made.numbers())
    html_file, markdown_file = write_pages(outcome, tmp_path, MADE)
    page, text = html_file.read_text(), markdown_file.read_text()
    assert "<b>weights</b>" not in page
    assert "<b>weights</b>" not in text
    for shown in (page, text):
        assert "explained by rounding" in shown  # 0.32 seen, 0.317 by rounding
        assert "paper: DS-Qwen OPD" in shown
        assert "opd-s0 in opd-s1" in shown
        assert "it is too large" in shown
        assert "sgd-best-s1 (best rate)" in shown
    data = json.loads(page.split('id="report-data">')[1].split("</script>")[0])
    assert set(data["figures"]) == {"published", "coverage", "subnetwork", "optimizers", "similarity", "rank"}
    for figure in data["figures"].values():
        go.Figure(figure)  # refuses what plotly does not know
    verdicts = {claim.id: outcome.verdict(claim) for claim in made.study.claims}
    assert verdicts["mask"].verdict == "reproduced"
    assert verdicts["over"].verdict == "reproduced"
    assert verdicts["over"].effect is not None
    assert verdicts["over"].effect.n == 1  # a pair of seeds counts once


def test_pages_of_nothing(tmp_path: Path) -> None:
    study = load_study(small_study())
    html_file, markdown_file = write_pages(Outcome(study, {}), tmp_path, MADE)
    assert "not run" in markdown_file.read_text()
    assert "opd-mask-s1" in html_file.read_text()


def test_turned_pairs_have_their_own_numbers(tmp_path: Path) -> None:
    made = runner(tmp_path, Stub())
    made.run()
    outcome = Outcome(made.study, made.numbers())
    turned = outcome.pair("pair", "opd-s1", "opd-s0")
    assert turned is not None
    assert (turned["a_in_b"], turned["core"]["a_in_b_random"], turned["a_in_b_excess"]) == (0.7, 0.25, 1.3)


def test_dry_run_lists_steps(tmp_path: Path) -> None:
    from deltalens.cli import app

    done = CliRunner().invoke(
        app, ["study", "smollm2-sums", "--scale", "small", "--dry-run", "-o", str(tmp_path / "x")]
    )
    assert done.exit_code == 0
    assert "to do  train       opd-mask-s0" in done.output
    assert not (tmp_path / "x").exists()
