"""`deltalens mask` and `deltalens intervene` on the command line."""

import sys
from pathlib import Path

import pytest
from subnetwork_fixtures import source_tensors, stored, trained_tensors

from deltalens import cli
from deltalens.subnetwork import SubnetworkMask


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deltalens", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def sides(write_checkpoint) -> tuple[Path, Path]:
    source = source_tensors()
    return write_checkpoint(source), write_checkpoint(trained_tensors(source))


def test_a_mask_and_what_it_keeps(run, sides, tmp_path: Path) -> None:
    code, stdout, stderr = run("mask", *sides, "-o", tmp_path / "a.mask", "--select", "visible", "--layers", "0")
    assert (code, stdout) == (0, "")
    for said in ("density", "ffn", "attention", "a.mask: visible"):
        assert said in stderr
    mask = SubnetworkMask.load(tmp_path / "a.mask", source=sides[0])
    code, _, stderr = run(
        "mask", sides[0], "-o", tmp_path / "b.mask", "--select", "random", "--like", tmp_path / "a.mask"
    )
    assert code == 0
    assert SubnetworkMask.load(tmp_path / "b.mask").total_density() == mask.total_density()
    code, _, stderr = run("intervene", *sides, "-o", tmp_path / "out", "--keep", f"mask:{tmp_path / 'a.mask'}")
    assert code == 0
    assert "‖Δ‖² kept" in stderr
    assert stored(tmp_path / "out").keys() == stored(sides[0]).keys()
    code, stdout, stderr = run("intervene", *sides, "-o", tmp_path / "quiet", "--keep", "rank:1", "-q")
    assert (code, stdout, stderr) == (0, "", "")


def test_mistakes_are_one_line(run, sides, tmp_path: Path) -> None:
    for arguments in (
        ["mask", sides[0], "-o", tmp_path / "a.mask", "--select", "visible"],
        ["mask", sides[0], "-o", tmp_path / "a.mask", "--select", "ranom:0.1"],
        ["intervene", *sides, "-o", sides[0], "--keep", "rank:1"],
    ):
        code, stdout, stderr = run(*arguments, "-q")
        assert (code, stdout) == (1, "")
        assert stderr.startswith("deltalens: ")
        assert stderr.count("\n") == 1
    assert not (tmp_path / "a.mask").exists()
    assert run("mask", sides[0], "-o", tmp_path / "a.mask", "--select", "visible", "--compare-dtype", "int8")[0] == 2
