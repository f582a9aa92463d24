"""The rows of a Ray cluster are those of the local engine; what goes wrong on it is said in a line."""

import dataclasses
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

import deltalens
from deltalens.analysis.journal import FOLDER
from deltalens.analysis.memory import held_bytes
from deltalens.analysis.ray_engine import WORKER_BYTES, Inputs, measure_all_on_ray
from deltalens.checkpoint import open_checkpoint, pair_checkpoints
from deltalens.cli import app
from deltalens.errors import CheckpointError, DeltalensError

ray = pytest.importorskip("ray")

TABLES = ("tensors.parquet", "spectra.parquet", "summary.json")
TENSORS = 7


@pytest.fixture(scope="module")
def pair(write_checkpoint) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    before, after = {}, {}
    for i in range(TENSORS):
        name = f"model.layers.{i}.mlp.down_proj.weight"
        before[name] = rng.standard_normal((20 + i, 40 - 5 * i)).astype(ml_dtypes.bfloat16)
        moved = before[name].astype(np.float32) * (1 + 4e-3 * rng.standard_normal(before[name].shape))
        after[name] = moved.astype(ml_dtypes.bfloat16)
    return write_checkpoint(before), write_checkpoint(after)


@pytest.fixture(scope="module")
def local(pair, tmp_path_factory) -> dict[str, bytes]:
    return contents(analyzed(pair, tmp_path_factory.mktemp("local")))


@pytest.fixture(scope="module")
def running():
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
        yield
        ray.shutdown()


@pytest.fixture
def cluster(running):
    """A cluster that this process is connected to."""
    yield
    assert ray.is_initialized()  # nobody ends a cluster that is not theirs


def analyzed(pair: tuple[Path, Path], out: Path, **options) -> Path:
    deltalens.analyze(*pair, output=out, **options)
    assert not (out / FOLDER).exists()
    return out


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in TABLES}


def test_the_command_gives_the_same_bytes(cluster, pair, local, tmp_path):
    command = ["analyze", *map(str, pair), "-o", str(tmp_path), "--engine", "ray", "--quiet"]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    assert contents(tmp_path) == local


def test_master_and_cache_reach_the_workers(cluster, pair, tmp_path, monkeypatch):
    options = {"master": pair[1].name, "cache": "kept"}  # relative to here, not to where a worker runs
    monkeypatch.chdir(pair[1].parent)
    here = analyzed(pair, tmp_path / "local", **options)
    before = {file.name for file in Path("kept").iterdir()}
    for file in Path("kept").iterdir():
        file.unlink()
    there = analyzed(pair, tmp_path / "ray", engine="ray", **options)
    assert contents(here) == contents(there)
    assert {file.name for file in Path("kept").iterdir()} == before != set()


def test_what_was_cut_short_on_a_cluster_goes_on_without_it(cluster, pair, local, tmp_path):
    seen: list[str] = []

    class Stop(Exception):
        pass

    def progress(done: int, total: int, name: str) -> None:
        seen.append(name)
        if len(seen) == 4:
            raise Stop

    with pytest.raises(Stop):
        deltalens.analyze(*pair, output=tmp_path, engine="ray", jobs=1, progress=progress)
    rows = (tmp_path / FOLDER / "rows.jsonl").read_text().splitlines()
    assert len(rows) == 3
    again: list[str] = []
    analyzed(pair, tmp_path, progress=lambda done, total, name: again.append(name))
    assert len(again) == 1 + TENSORS - len(rows)
    assert contents(tmp_path) == local


@pytest.mark.parametrize(("shape", "peak"), [((1024, 4096), 0.33), ((4096, 4096), 0.55), ((14336, 4096), 0.79)])
def test_a_task_asks_for_the_memory_that_its_matrix_was_seen_to_need(pair, shape, peak):
    """`peak`: GB of a process in exact mode, as docs/performance.md has them."""
    with open_checkpoint(pair[0]) as source, open_checkpoint(pair[1]) as trained:
        one = dataclasses.replace(pair_checkpoints(source, trained).pairs[0], shape=shape)
    asked = {
        spectrum: WORKER_BYTES + held_bytes(one, deltalens.Settings(spectrum=spectrum))
        for spectrum in ("exact", "none")
    }
    assert peak * 1e9 < asked["exact"] < 1.5 * peak * 1e9
    assert asked["none"] < asked["exact"]


def test_errors_of_a_worker_are_its_own(cluster, pair, tmp_path, write_checkpoint):
    with open_checkpoint(pair[0]) as source, open_checkpoint(pair[1]) as trained:
        pairs = pair_checkpoints(source, trained).pairs
        inputs = Inputs.of(source, trained, None, None, deltalens.Settings(compare_dtype="bf16"))
        (name, size), *_ = inputs.files[1]
        for wrong, message in (
            (dataclasses.replace(inputs, files=(inputs.files[0], ((name, size + 1),))), "other files than"),
            (dataclasses.replace(inputs, trained=str(tmp_path / "elsewhere")), "no such file"),
        ):
            with pytest.raises(CheckpointError, match=f"{message}.*Ray node .*all nodes must see"):
                measure_all_on_ray(pairs, wrong)
        lost = [dataclasses.replace(pairs[0], trained_name="gone")]
        with pytest.raises(ray.exceptions.RayTaskError, match="gone"):  # our own mistake keeps its traceback
            measure_all_on_ray(lost, inputs)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (None, "wants a cluster: set RAY_ADDRESS .*--engine local"),
        ("127.0.0.1:1", r"RAY_ADDRESS=127\.0\.0\.1:1: no Ray cluster answers there .*Connection refused"),
        ("nowhere.invalid:6379", r"RAY_ADDRESS=nowhere\.invalid:6379: no Ray cluster answers there"),
    ],
)
def test_no_cluster(pair, monkeypatch, address, message):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    if address is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(DeltalensError, match=message):
        deltalens.analyze(*pair, engine="ray")


def test_an_engine_that_is_not_there(pair, monkeypatch):
    with pytest.raises(DeltalensError, match="'slurm': choose one of local, ray"):
        deltalens.analyze(*pair, engine="slurm")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DeltalensError, match=r"pip install 'deltalens\[ray\]'"):
        deltalens.analyze(*pair, engine="ray")
