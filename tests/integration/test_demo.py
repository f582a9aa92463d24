"""The demo's training half from end to end on a tiny random model, with a kill in the middle."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from deltalens.errors import DeltalensError
from deltalens.train.demo import DemoResult, run_demo

STEPS = 12

KILLED_AT_STEP_11 = """
import os, signal, sys
from pathlib import Path
from deltalens.train import demo

train = demo.train

def train_until_killed(*args, **kwargs):
    def step(number, total, loss):
        if number == 11:
            os.kill(os.getpid(), signal.SIGKILL)
    return train(*args, on_step=step, **kwargs)

demo.train = train_until_killed
demo.run_demo(Path(sys.argv[2]), model=sys.argv[1], steps=int(sys.argv[3]), problems=20)
"""


@pytest.fixture(scope="module")
def demo(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoResult]:
    output = tmp_path_factory.mktemp("demo") / "out"
    return output, run_demo(output, model=str(tiny_model), steps=STEPS, problems=20, keep_master=True, quiet=True)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_everything_promised_is_there(demo: tuple[Path, DemoResult], tiny_model: Path) -> None:
    output, result = demo
    assert {path.name for path in output.iterdir()} == {
        "run", "before.jsonl", "teacher.jsonl", "after.jsonl", "demo.json",
    }  # fmt: skip
    assert {path.name for path in (output / "run").iterdir()} == {"model", "master", "manifest.json", "log.jsonl"}
    assert result.source == tiny_model
    assert (result.student, result.master) == (output / "run" / "model", output / "run" / "master")
    assert [entry["step"] for entry in result.curve] == list(range(1, STEPS + 1))
    assert weights(result.student) != weights(tiny_model)
    trained, source = (json.loads((folder / "config.json").read_text()) for folder in (result.student, tiny_model))
    assert trained == source
    assert trained["dtype"] == "bfloat16"
    assert len((output / "after.jsonl").read_text().splitlines()) == result.after.problems == 20
    assert not result.improved, "a random model of two layers learns no sums in twelve steps"


def test_the_student_is_the_master_rounded_to_bfloat16(demo: tuple[Path, DemoResult]) -> None:
    output, _ = demo
    import ml_dtypes

    master, student = (load_file(output / "run" / name / "model.safetensors") for name in ("master", "model"))
    assert master.keys() == student.keys()
    for name, tensor in master.items():
        assert tensor.dtype == "float32"
        assert (tensor.astype(ml_dtypes.bfloat16).view("uint16") == student[name].view("uint16")).all(), name


def test_a_second_call_repeats_nothing(
    demo: tuple[Path, DemoResult], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, result = demo

    def never(*_: object, **__: object) -> None:
        raise AssertionError("done already")

    monkeypatch.setattr("deltalens.train.demo.evaluate", never)
    monkeypatch.setattr("deltalens.train.run.build_trainer", never)
    again = run_demo(output, model=str(tiny_model), steps=STEPS, problems=20, keep_master=True, quiet=True)
    assert again.curve == result.curve
    assert again.after.summary() == result.after.summary()


def test_other_settings_are_refused_unless_fresh(
    demo: tuple[Path, DemoResult], tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(demo[0], output)
    with pytest.raises(DeltalensError, match="another config; use --fresh"):
        run_demo(output, model=str(tiny_model), steps=STEPS + 1, problems=20, quiet=True)
    changed = tmp_path / "model"
    shutil.copytree(tiny_model, changed)
    (changed / "generation_config.json").write_text('{"eos_token_id": 1}')
    with pytest.raises(DeltalensError, match="another source; use --fresh"):
        run_demo(output, model=str(changed), steps=STEPS, problems=20, quiet=True)
    (output / "demo.json").write_text("{")
    with pytest.raises(DeltalensError, match="not readable; use --fresh"):
        run_demo(output, model=str(tiny_model), steps=STEPS, problems=20, quiet=True)
    fresh = run_demo(output, model=str(tiny_model), steps=1, problems=20, quiet=True, fresh=True)
    assert len(fresh.curve) == 1
    assert not (output / "run" / "master").exists()


def test_killed_in_training_it_goes_on_to_the_same_student(
    demo: tuple[Path, DemoResult], tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-c", KILLED_AT_STEP_11, str(tiny_model), str(output), str(STEPS)]
    killed = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # Nothing but our own lines on stderr: no warning and no bar of the libraries.
    said = {line.split(":")[0] for line in killed.stderr.splitlines()}
    assert said <= {"model", "accuracy before", "accuracy of teacher", "training"}
    assert not killed.stdout
    assert not (output / "run" / "model").exists()
    result = run_demo(output, model=str(tiny_model), steps=STEPS, problems=20, quiet=True)
    assert result.curve == demo[1].curve
    assert weights(result.student) == weights(demo[1].student)


def test_a_bad_model_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DeltalensError, match="is not a model folder"):
        run_demo(tmp_path / "out", model=str(tmp_path / "absent"), quiet=True)
    with pytest.raises(DeltalensError, match="only 500 pairs are held out"):
        run_demo(tmp_path / "out", problems=501, quiet=True)
    for name in ("steps", "seed", "problems"):
        with pytest.raises(DeltalensError, match=f"{name} must be at least"):
            run_demo(tmp_path / "out", quiet=True, **{name: -1})
    assert not (tmp_path / "out").exists()
