"""An analysis that is cut short goes on where it stopped, and ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import deltalens
from deltalens.analysis.journal import FOLDER, Journal
from deltalens.analysis.pair import Measured
from deltalens.errors import DeltalensError

BF16 = ml_dtypes.bfloat16
TABLES = ("tensors.parquet", "spectra.parquet", "summary.json")


def tensors(count: int, size: int, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    before, after = {}, {}
    for i in range(count):
        name = f"model.layers.{i}.mlp.down_proj.weight"
        shape = (size + i % 3, size - i % 5)  # not all of one shape
        before[name] = rng.standard_normal(shape).astype(BF16)
        after[name] = (before[name].astype(np.float32) * (1 + 4e-3 * rng.standard_normal(shape))).astype(BF16)
    before["model.norm.weight"] = np.ones(size, BF16)
    after["model.norm.weight"] = np.ones(size, BF16)
    return before, after


@pytest.fixture(scope="module")
def small(write_checkpoint) -> tuple[Path, Path]:
    before, after = tensors(12, 20)
    return write_checkpoint(before), write_checkpoint(after)


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in TABLES}


class Stop(Exception):
    """Stands for whatever ends an analysis."""


def stop_after(rows: int):
    """A progress callback that ends the analysis once `rows` tensors are done; counts what was measured."""
    seen = []

    def progress(done: int, total: int, name: str) -> None:
        if name:
            seen.append(name)
        if len(seen) == rows:
            raise Stop

    progress.seen = seen  # type: ignore[attr-defined]
    return progress


def cut_short(pair: tuple[Path, Path], out: Path, rows: int = 5) -> Path:
    with pytest.raises(Stop):
        deltalens.analyze(*pair, output=out, jobs=1, progress=stop_after(rows))
    journal = out / FOLDER
    assert len((journal / "rows.jsonl").read_text().splitlines()) >= rows
    assert not (out / "summary.json").exists()
    return journal


def measured_by(pair: tuple[Path, Path], out: Path, **options) -> int:
    """How many tensors a run that goes through to the end measures itself."""
    progress = stop_after(-1)
    deltalens.analyze(*pair, output=out, jobs=1, progress=progress, **options)
    assert not (out / FOLDER).exists()
    return len(progress.seen)


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    assert measured_by(small, out) == 13
    return contents(out)


def test_a_stopped_analysis_goes_on_where_it_was(small, whole, tmp_path):
    journal = cut_short(small, tmp_path)
    kept = len((journal / "rows.jsonl").read_text().splitlines())
    assert measured_by(small, tmp_path) == 13 - kept
    assert contents(tmp_path) == whole


def test_fresh_starts_again(small, whole, tmp_path):
    cut_short(small, tmp_path)
    assert measured_by(small, tmp_path, resume=False) == 13
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("tear", ["half a line", "garbage", "no newline", "lost spectra"])
def test_a_torn_end_is_dropped(small, whole, tmp_path, tear):
    journal = cut_short(small, tmp_path)
    rows, spectra = journal / "rows.jsonl", journal / "spectra.bin"
    lines = rows.read_bytes().splitlines(keepends=True)
    if tear == "half a line":
        rows.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    elif tear == "no newline":
        rows.write_bytes(b"".join(lines)[:-1])
    elif tear == "garbage":
        rows.write_bytes(b"".join(lines[:-1]) + b"\x00" * 300)
    else:
        spectra.write_bytes(spectra.read_bytes()[:-5])
    again = measured_by(small, tmp_path)
    assert again == 13 - (len(lines) - 1)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("change", ["trained", "threshold", "ratios", "include"])
def test_another_input_or_setting_is_not_taken_up(tmp_path, write_checkpoint, change):
    before, after = tensors(8, 16)
    pair = write_checkpoint(before), write_checkpoint(after)
    cut_short(pair, tmp_path / "out", rows=3)
    options = {}
    if change == "trained":
        _, other = tensors(8, 16, seed=1)
        file = pair[1] / "model.safetensors"
        written = file.stat()
        save_file(other, file)  # the same size; only the time of the change tells
        assert file.stat().st_size == written.st_size
    elif change == "threshold":
        options["settings"] = deltalens.Settings(threshold=1e-3)
    elif change == "ratios":
        options["settings"] = deltalens.Settings(ratios=(0.3,))
    else:
        options["include"] = ["*down_proj*"]
    assert measured_by(pair, tmp_path / "out", **options) == (8 if change == "include" else 9)
    deltalens.analyze(*pair, output=tmp_path / "anew", jobs=1, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "anew")


@pytest.mark.parametrize("jobs", [2, 5])
def test_results_do_not_depend_on_the_number_of_threads(small, whole, tmp_path, jobs):
    deltalens.analyze(*small, output=tmp_path, jobs=jobs)
    assert contents(tmp_path) == whole


def test_the_cache_keeps_masks_apart(small, tmp_path):
    """Of one rank, and so from the same factors, but of another share."""
    for share in (0.5, 0.3):
        settings = deltalens.Settings(mask_rank=2, mask_share=share)
        deltalens.analyze(*small, output=tmp_path / "alone", settings=settings)
        deltalens.analyze(*small, output=tmp_path / "cached", settings=settings, cache=tmp_path / "cache")
        assert contents(tmp_path / "cached") == contents(tmp_path / "alone")


def never(*_):
    raise AssertionError("made again")


def test_nor_on_the_cache_of_the_source(small, whole, tmp_path, monkeypatch):
    for name in ("cold", "warm"):
        deltalens.analyze(*small, output=tmp_path / name, cache=tmp_path / "cache")
        assert contents(tmp_path / name) == whole
        # the second time nothing is made of the source alone
        monkeypatch.setattr("deltalens.analysis.spectral.find_members", never)
        monkeypatch.setattr("deltalens.analysis.spectral.SpectralColumns.factorise_source", never)
    monkeypatch.undo()
    stored = sorted((tmp_path / "cache").iterdir())
    assert len(stored) == 2 * 12
    kinds = [next(file for file in stored if ("masks" in file.name) == masks) for masks in (True, False)]
    for file in kinds:
        file.write_bytes(b"not what it says")  # made again, not trusted
    deltalens.analyze(*small, output=tmp_path / "damaged", cache=tmp_path / "cache")
    assert contents(tmp_path / "damaged") == whole
    assert all(file.stat().st_size > 100 for file in kinds)
    monkeypatch.setattr("deltalens.analysis.cache.REVISION", -1)  # what another version kept is left alone
    deltalens.analyze(*small, output=tmp_path / "another", cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2 * len(stored)


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(write_checkpoint) -> tuple[Path, Path]:
    before, after = tensors(60, 220)
    return write_checkpoint(before), write_checkpoint(after)


def start(pair: tuple[Path, Path], out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "deltalens", "analyze", *map(str, pair), "-o", str(out), "--jobs", "1", "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def lines_of(out: Path) -> int:
    rows = out / FOLDER / "rows.jsonl"
    return rows.read_bytes().count(b"\n") if rows.exists() else 0


def wait_for_lines(process: subprocess.Popen[str], out: Path, lines: int) -> None:
    deadline = time.monotonic() + 60
    while lines_of(out) < lines:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_interrupted_then_killed_then_finished(large, tmp_path):
    out = tmp_path / "out"
    with start(large, out) as process:
        wait_for_lines(process, out, 5)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "interrupted" in stderr
    kept = lines_of(out)
    assert 5 <= kept < 61
    assert not (out / "summary.json").exists()

    with start(large, out) as process:
        wait_for_lines(process, out, kept + 5)
        process.kill()
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert kept + 5 <= lines_of(out) < 61
    names = [json.loads(line)["row"]["name"] for line in (out / FOLDER / "rows.jsonl").read_text().splitlines()[:-1]]
    assert len(set(names)) == len(names)  # the second run took up the first one's rows

    with start(large, out) as process:
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 0, stderr
    assert not (out / FOLDER).exists()
    deltalens.analyze(*large, output=tmp_path / "whole", jobs=2)
    assert contents(out) == contents(tmp_path / "whole")


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    class Full:
        def tell(self):
            raise OSError(28, "No space left on device")

    journal = Journal(tmp_path, {"of": "nothing"}, resume=True)
    journal.close()
    monkeypatch.setattr(journal, "_spectra_stream", Full())
    with pytest.raises(DeltalensError, match=r"No space left on device.*free some space"):
        journal.add(Measured({"name": "w"}))
