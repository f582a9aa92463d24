"""The command line: what it writes, its exit codes, and one clear line for every mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import polars as pl
import pytest

from deltalens import cli

BF16 = ml_dtypes.bfloat16
NAMES = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3))]


@pytest.fixture(scope="module")
def sides(write_checkpoint) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    before = {name: rng.standard_normal((40, 24)).astype(BF16) for name in NAMES}
    after = {name: (v.astype(np.float32) * (1 + 4e-3 * rng.standard_normal(v.shape))).astype(BF16)
             for name, v in before.items()}  # fmt: skip
    return write_checkpoint(before, shards=2), write_checkpoint(after)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command line in this process; returns exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deltalens", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        return code, *capsys.readouterr()

    return call


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deltalens", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_analyze_writes_everything_and_prints_a_table(run, sides, tmp_path):
    out = tmp_path / "a" / "b"
    code, stdout, stderr = run("analyze", *sides, "-o", out)
    assert code == 0
    assert stdout == ""
    assert {file.name for file in out.iterdir()} == {
        "tensors.parquet", "spectra.parquet", "summary.json", "manifest.json", "report.html"
    }  # fmt: skip
    assert pl.read_parquet(out / "tensors.parquet")["name"].sort().to_list() == sorted(NAMES)
    assert "report.html" in stderr
    assert "Traceback" not in stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["blake3"]) == set(NAMES)
    assert [len(manifest[side]["files"]) for side in ("source", "trained")] == [2, 1]


def test_json_is_alone_on_stdout(run, sides, tmp_path):
    code, stdout, stderr = run("analyze", *sides, "--json", "-o", tmp_path)
    assert code == 0
    assert json.loads(stdout) == json.loads((tmp_path / "summary.json").read_text())
    assert stderr == ""


def test_quiet_prints_nothing(run, sides):
    assert run("analyze", *sides, "--quiet") == (0, "", "")


def test_options_reach_the_settings(run, sides):
    arguments = ("--threshold", "1e-4", "--ratios", "0.3,0.02", "--compare-dtype", "fp32", "--mask-rank", 4,
                 "--mask-share", "0.4", "--include", "*up_proj*", "--exclude", "*layers.2*")  # fmt: skip
    code, stdout, _ = run("analyze", *sides, "--json", *arguments)
    summary = json.loads(stdout)
    assert code == 0
    assert summary["settings"]["ratios"] == [0.02, 0.1, 0.3]
    assert summary["settings"]["threshold"] == 1e-4
    assert summary["settings"]["compare_dtype"] == "fp32"
    assert summary["global"]["tensors"] == 2
    assert "principal_coverage_rank4_40pct" in summary["global"]


def test_version_and_help(run):
    code, stdout, _ = run("--version")
    assert code == 0
    assert re.fullmatch(r"deltalens \d+\.\d+\.\d+\S*\n", stdout)
    code, stdout, _ = run("analyze", "--help")
    assert code == 0
    assert "SOURCE" in stdout
    assert "--ratios" in stdout


# --- mistakes --------------------------------------------------------------------------------------------------------


def broken_shard(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def absent_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def outside_shard(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    secret = folder.parent / "outside.safetensors"
    secret.write_bytes((folder / "model-00002-of-00002.safetensors").read_bytes())
    content["weight_map"][NAMES[1]] = "../outside.safetensors"
    index.write_text(json.dumps(content))


def garbage_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def garbage_shard(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"these are not the weights you are looking for")


def empty_shard(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")


MISTAKES = {
    broken_shard: r"model-00002-of-00002\.safetensors.*(cut short|ends before)",
    absent_shard: r"model-00002-of-00002\.safetensors.*not there",
    outside_shard: r"\.\./outside\.safetensors.*(refused|folder)",
    garbage_index: r"model\.safetensors\.index\.json.*not a checkpoint index",
    garbage_shard: r"model-00001-of-00002\.safetensors.*not a safetensors file",
    empty_shard: r"model-00001-of-00002\.safetensors.*not a safetensors file",
}


def check_one_line(code: int, stdout: str, stderr: str, said: str, out: Path) -> None:
    assert code == 1, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    lines = stderr.strip("\n").split("\n")
    assert len(lines) == 1, stderr
    assert lines[0].startswith("deltalens: ")
    assert re.search(said, lines[0]), lines[0]
    assert not out.exists()


@pytest.mark.parametrize("quiet", [True, False], ids=["quiet", "with progress"])
@pytest.mark.parametrize("trained_is_bad", [False, True])
@pytest.mark.parametrize("damage", MISTAKES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint(run, sides, tmp_path, write_checkpoint, damage, trained_is_bad, quiet):
    good = sides[1]
    rng = np.random.default_rng(0)
    bad = write_checkpoint({name: rng.standard_normal((40, 24)).astype(BF16) for name in NAMES}, shards=2)
    damage(bad)
    out = tmp_path / "out"
    pair = (good, bad) if trained_is_bad else (bad, good)
    check_one_line(*run("analyze", *pair, "-o", out, *(["--quiet"] if quiet else [])), MISTAKES[damage], out)


def test_a_path_that_does_not_exist(run, sides, tmp_path):
    out = tmp_path / "out"
    check_one_line(*run("analyze", sides[0], tmp_path / "no-such", "-o", out), r"no-such.*no such file", out)
    check_one_line(*run("analyze", tmp_path / "no-such", sides[1], "-o", out), r"no-such.*no such file", out)
    check_one_line(
        *run("analyze", *sides, "--master", tmp_path / "no-master", "-o", out), r"no-master.*no such file", out
    )


def test_an_empty_folder_and_a_file_that_is_no_checkpoint(run, sides, tmp_path):
    out, empty, text = tmp_path / "out", tmp_path / "empty", tmp_path / "notes.safetensors"
    empty.mkdir()
    text.write_text("hello " * 100)
    check_one_line(*run("analyze", sides[0], empty, "-o", out), r"empty.*no checkpoint", out)
    check_one_line(*run("analyze", text, sides[1], "-o", out), r"notes\.safetensors.*not a safetensors file", out)


def test_two_models_of_different_shapes(run, sides, tmp_path, write_checkpoint):
    out = tmp_path / "out"
    names = NAMES[1:]
    small, large = (write_checkpoint({name: np.ones((size, 8), BF16) for name in names}) for size in (6, 7))
    check_one_line(*run("analyze", small, large, "-o", out), r"shape", out)
    other = write_checkpoint({"decoder.w.weight": np.ones((6, 8), BF16)})
    check_one_line(*run("analyze", small, other, "-o", out), r"in common", out)


def test_a_model_without_floating_tensors(run, tmp_path, write_checkpoint):
    out = tmp_path / "out"
    whole = write_checkpoint({NAMES[1]: np.ones((6, 8), np.int8)})
    check_one_line(*run("analyze", whole, whole, "-o", out), r"no floating-point tensor", out)


def test_patterns_that_leave_nothing(run, sides, tmp_path):
    out = tmp_path / "out"
    check_one_line(*run("analyze", *sides, "--include", "nothing*", "-o", out), r"include", out)


def test_an_output_that_cannot_be_written(run, sides, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    check_one_line(*run("analyze", *sides, "-o", out), r"file.*(cannot be written).*-o", out)
    code, _, stderr = run("analyze", *sides, "-o", tmp_path / "file")
    assert code == 1
    assert "cannot be written" in stderr
    assert "Traceback" not in stderr
    assert (tmp_path / "file").read_text() == ""


def test_a_cache_that_cannot_be_written(run, sides, tmp_path):
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "cache"):
        out = tmp_path / "out"
        check_one_line(*run("analyze", *sides, "-o", out, "--cache", cache), r"cannot be written.*--cache", out)


def test_results_that_cannot_be_put_in_place_leave_the_journal(run, sides, tmp_path):
    (tmp_path / "tensors.parquet").mkdir()
    code, _, stderr = run("analyze", *sides, "-o", tmp_path, "--quiet")
    assert code == 1
    assert re.fullmatch(r"deltalens: .*cannot be written.*\n", stderr)
    assert not list(tmp_path.glob("*.partial"))
    (tmp_path / "tensors.parquet").rmdir()
    assert run("analyze", *sides, "-o", tmp_path, "--quiet")[0] == 0


def test_master_weights_of_another_model(run, sides, tmp_path, write_checkpoint):
    out = tmp_path / "out"

    def against(tensors: dict[str, np.ndarray]) -> tuple[int, str, str]:
        return run("analyze", *sides, "-o", out, "--master", write_checkpoint(tensors))

    check_one_line(*against({"x.weight": np.ones((40, 24), np.float32)}), r"none of the tensors", out)
    for shape in ((41, 24), (39, 24), (24, 40)):
        check_one_line(*against({NAMES[1]: np.ones(shape, np.float32)}), r"up_proj.*\[40, 24\].*--master", out)
    check_one_line(*against({NAMES[1]: np.ones((40, 24), np.int32)}), r"up_proj.*I32", out)


def test_master_weights_that_lack_some_tensors(run, sides, write_checkpoint):
    master = write_checkpoint({NAMES[1]: np.ones((40, 24), np.float32)})
    code, stdout, _ = run("analyze", *sides, "--json", "--master", master)
    assert code == 0
    assert any("3 tensors are not in --master" in warning for warning in json.loads(stdout)["warnings"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ratios", "a,b"), "not a list of numbers"),
        (("--ratios", "0.1,1.5"), "between 0 and 1"),
        (("--threshold", "-1"), "threshold"),
        (("--threshold", "nan"), "threshold"),
        (("--compare-dtype", "fp8"), "fp8"),
        (("--spectrum", "some"), "exact, fast or none"),
        (("--jobs", "0"), "jobs"),
        (("--no-such-option",), "no-such-option"),
    ],
)
def test_bad_usage(run, sides, tmp_path, arguments, said):
    out = tmp_path / "out"
    code, stdout, stderr = run("analyze", *sides, "-o", out, *arguments)
    assert code == 2
    assert stdout == ""
    assert said in re.sub(r"[\s│]+", " ", stderr)
    assert "Traceback" not in stderr
    assert not out.exists()


def test_missing_argument(run, sides):
    code, _, stderr = run("analyze", sides[0])
    assert code == 2
    assert "TRAINED" in stderr


def test_a_mistake_in_a_process_of_its_own(sides, tmp_path):
    done = process("analyze", sides[0], tmp_path / "no-such", "-o", tmp_path / "out")
    check_one_line(done.returncode, done.stdout, done.stderr, "no such file", tmp_path / "out")
