"""The whole trajectory on small constructed runs: twins, locking, steps, resuming, and the rows that analyze gives."""

import json
import shutil
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

import deltalens
from deltalens.analysis import engine
from deltalens.analysis.trajectory import run_steps
from deltalens.checkpoint.formats.safetensors import SafetensorsSource
from deltalens.cli import app
from deltalens.errors import CheckpointError, ConfigError

BF16 = ml_dtypes.bfloat16
UP, Q, NORM = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
SHAPES = {UP: (60, 40), Q: (36, 36), NORM: (40,)}


@pytest.fixture(scope="module")
def source() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: (0.05 * rng.standard_normal(shape)).astype(BF16) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def run(write_checkpoint, tmp_path_factory, source) -> tuple[Path, list[Path]]:
    """SOURCE and four checkpoints, given out of order; some coordinates come and go."""
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("run")
    total = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    paths = []
    for step in (5, 20, 100, 40):
        tensors = {}
        for name, weights in source.items():
            total[name] = 0.7 * total[name] + 3e-4 * rng.standard_normal(SHAPES[name])
            tensors[name] = (weights.astype(np.float64) + total[name]).astype(BF16)
        paths.append(folder / f"checkpoint-{step}")
        shutil.move(write_checkpoint(tensors), paths[-1])
    return write_checkpoint(source), paths


def load(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {name: values.astype(np.float64) for name, values in load_file(path / "model.safetensors").items()}


def test_every_number_against_plain_arrays(run):
    path, checkpoints = run
    result = deltalens.trajectory(path, checkpoints, settings=deltalens.Settings(null_draws=2))
    ordered = sorted(checkpoints, key=lambda one: int(one.name.split("-")[1]))
    assert [one["step"] for one in result.summary["checkpoints"]] == [5, 20, 40, 100]
    assert result.summary["steps_from"] == "name"
    source = load(path)
    tau = float(np.float64(1e-5).astype(BF16))
    deltas = [
        {name: (load(one)[name] - source[name]).astype(BF16).astype(np.float64) for name in SHAPES} for one in ordered
    ]
    masks = [{name: np.abs(delta[name]) > tau for name in SHAPES} for delta in deltas]
    for scope, key, names in (
        ("global", "all", list(SHAPES)),
        ("role", "ffn", [UP]),
        ("layer", "1", [Q]),
        ("module", "up_proj", [UP]),
        ("tensor", NORM, [NORM]),
    ):
        rows = result.table.filter((pl.col("scope") == scope) & (pl.col("key") == key)).sort("step").to_dicts()
        assert len(rows) == 4, scope
        size = sum(source[name].size for name in names)
        previous = {name: np.zeros(SHAPES[name], bool) for name in names}
        ever = dict(previous)
        step = 0
        for row, delta, mask in zip(rows, deltas, masks, strict=True):
            end = masks[-1]
            shared = sum((mask[name] & end[name]).sum() for name in names)
            either = sum((mask[name] | end[name]).sum() for name in names)
            appeared = sum((mask[name] & ~previous[name]).sum() for name in names)
            vanished = sum((previous[name] & ~mask[name]).sum() for name in names)
            returned = sum((mask[name] & ~previous[name] & ever[name]).sum() for name in names)
            stepped = sum((mask[name] | previous[name]).sum() for name in names)
            chance = sum(mask[name].mean() * end[name].mean() * source[name].size for name in names)
            both = sum(mask[name].sum() + end[name].sum() for name in names)
            assert row["jaccard_end"] == pytest.approx(shared / either)
            assert row["appeared"] == appeared / size
            assert row["vanished"] == vanished / size
            assert row["returned"] == returned / size
            assert row["churn"] == pytest.approx((appeared + vanished) / stepped)
            assert row["vanished_per_step"] == pytest.approx(vanished / size / (row["step"] - step))
            assert row["sparsity"] == pytest.approx(1 - sum(mask[name].sum() for name in names) / size)
            ever = {name: ever[name] | mask[name] for name in names}
            assert row["ever_visible"] == pytest.approx(sum(one.sum() for one in ever.values()) / size)
            energy = sum((delta[name] ** 2).sum() for name in names)
            if scope != "global":
                assert row["energy_share"] == pytest.approx(energy / sum((d**2).sum() for d in delta.values()))
            if row["step"] < 100:
                assert row["jaccard_end_random"] == pytest.approx(chance / (both - chance))
                assert row["jaccard_end_null"] > row["jaccard_end_random"]
            else:
                assert (row["jaccard_end"], row["jaccard_end_random"], row["jaccard_end_null"]) == (1, None, None)
            for side, index in (("right", 1), ("left", 0)):
                for which, other in (("end", deltas[-1]), ("start", deltas[0])):
                    found = [
                        np.sum((basis(delta[n], index).T @ basis(other[n], index)) ** 2) / 16
                        for n in names
                        if n != NORM
                    ]
                    value = row[f"sim16_{side}_{which}"]
                    assert value == (pytest.approx(np.median(found)) if found else None)
                    ours = {"end": 100, "start": 5}[which]
                    if found and row["step"] != ours:
                        chances = [16 / SHAPES[n][index] for n in names if n != NORM]
                        assert row[f"sim16_{side}_{which}_random"] == pytest.approx(np.median(chances))
                        assert row[f"sim16_{side}_{which}_null"] == pytest.approx(np.median(chances), abs=0.12)
            previous, step = mask, row["step"]


def basis(delta: np.ndarray, side: int) -> np.ndarray:
    u, _, vt = np.linalg.svd(delta)
    return u[:, :16] if side == 0 else vt[:16].T


@pytest.mark.parametrize("spectrum", ["exact", "fast", "none"])
def test_a_checkpoint_has_the_row_that_analyze_gives_it(run, spectrum):
    path, checkpoints = run
    settings = deltalens.Settings(spectrum=spectrum, null_draws=2, mask_rank=5)
    table = deltalens.trajectory(path, checkpoints, settings=settings).table
    for checkpoint in checkpoints[1:3]:  # one on the way, and the end
        step = int(checkpoint.name.split("-")[1])
        analysed = deltalens.analyze(path, checkpoint, settings=settings)
        rows = table.filter((pl.col("scope") == "tensor") & (pl.col("step") == step))
        for expected in analysed.tensors.to_dicts():
            found = rows.row(by_predicate=pl.col("key") == expected["name"], named=True)
            for column, value in expected.items():
                # The draws of the end are those of analyze; on the way they are others, independent of them.
                drawn = column.endswith("_null_std") or (column.endswith("_null") and "coverage" not in column)
                if column in ("name", "layer", "role", "module", "shape", "spectrum_mode") or isinstance(value, str):
                    continue
                if not drawn or step == 100:
                    assert found[column] == (None if value is None else pytest.approx(value, rel=1e-7)), column
        whole = table.row(by_predicate=(pl.col("scope") == "global") & (pl.col("step") == step), named=True)
        overall = analysed.summary["global"]
        assert whole["stable_rank"] == (
            overall["stable_rank"]["median"] and pytest.approx(overall["stable_rank"]["median"])
        )
        assert whole["sparsity_1e-06"] == overall["sparsity_at"]["1e-06"]
        coverage = overall["low_magnitude_coverage_10pct_core"]
        assert whole["low_magnitude_coverage_10pct_core"] == pytest.approx(coverage["pooled"])
        assert whole["low_magnitude_coverage_10pct_core_excess_low"] == pytest.approx(coverage["excess_low"])


def constructed(write_checkpoint, tmp_path: Path, angles: list[float]) -> tuple[Path, list[Path]]:
    """Rank-16 updates in float32 whose subspaces lie at an angle to the last one's."""
    rng = np.random.default_rng(3)
    left, right = (np.linalg.qr(rng.standard_normal((size, 32)))[0] for size in (80, 70))
    before = rng.standard_normal((80, 70)).astype(np.float32)
    paths = []
    for i, angle in enumerate(angles):
        u = np.cos(angle) * left[:, :16] + np.sin(angle) * left[:, 16:]
        v = np.cos(angle) * right[:, :16] + np.sin(angle) * right[:, 16:]
        after = before + ((i + 1) * np.linspace(2, 1, 16) * u) @ v.T
        paths.append(tmp_path / f"step_{i + 1}")
        shutil.move(write_checkpoint({UP: after.astype(np.float32)}), paths[-1])
    return write_checkpoint({UP: before}), paths


@pytest.mark.parametrize(
    ("angles", "locked"),
    [
        ([1.2, 0.8, 0.3, 0.1, 0.0], 3),  # cos² of 0.3 is 0.91, of 0.8 it is 0.49
        ([0.1, 0.2, 0.3, 0.1, 0.0], 1),
        ([0.1, 0.9, 0.3, 0.1, 0.0], 3),  # near at first, then away: it must stay
        ([1.5, 1.2, 0.9, 0.6, 0.0], None),  # keeps turning
    ],
)
def test_locked_at(write_checkpoint, tmp_path, angles, locked):
    path, checkpoints = constructed(write_checkpoint, tmp_path, angles)
    result = deltalens.trajectory(path, checkpoints, settings=deltalens.Settings(compare_dtype="stored"))
    similar = result.table.filter(pl.col("scope") == "global").sort("step")["sim16_right_end"].to_list()
    np.testing.assert_allclose(similar, np.cos(np.subtract(angles, angles[-1])) ** 2, atol=1e-3)
    assert result.summary["locked_at"] == locked
    assert result.summary["locked_at_by_role"] == {"ffn": locked}
    assert result.summary["locked_checkpoint"] == (None if locked is None else f"step_{locked}")


def test_each_tensor_is_read_once(run, monkeypatch):
    path, checkpoints = run
    reads: list[tuple[str, str]] = []
    original = SafetensorsSource.read

    def read(self, name, *arguments, **options):
        reads.append((str(self.files[0].parent), name))
        return original(self, name, *arguments, **options)

    monkeypatch.setattr(SafetensorsSource, "read", read)
    factorised: list[int] = []
    from deltalens.analysis import spectral

    plain = spectral.factorise
    monkeypatch.setattr(spectral, "factorise", lambda *a: factorised.append(1) or plain(*a))
    deltalens.trajectory(path, checkpoints, settings=deltalens.Settings())
    assert sorted(reads) == sorted((str(folder), name) for folder in (path, *checkpoints) for name in SHAPES)
    assert len(factorised) == 2 * (1 + len(checkpoints))  # two matrices: the source once, each checkpoint once


def test_a_run_cut_short_goes_on_and_gives_the_same(run, tmp_path, monkeypatch):
    path, checkpoints = run
    settings = deltalens.Settings(null_draws=1)
    whole = deltalens.trajectory(path, checkpoints, settings=settings)
    module = sys.modules["deltalens.analysis.trajectory"]
    plain, calls = module.follow, []

    def failing(tensor, *arguments):
        if len(calls) == 2:
            time.sleep(0.3)  # until the engine has written down what is finished
            raise CheckpointError("gone")
        calls.append(tensor.name)
        return plain(tensor, *arguments)

    monkeypatch.setattr(module, "follow", failing)
    with pytest.raises(CheckpointError, match="gone"):
        deltalens.trajectory(path, checkpoints, output=tmp_path, settings=settings, jobs=1)
    monkeypatch.setattr(module, "follow", lambda tensor, *a: calls.append(tensor.name) or plain(tensor, *a))
    seen = []
    result = deltalens.trajectory(
        path, checkpoints, output=tmp_path, settings=settings, jobs=1, progress=lambda *a: seen.append(a)
    )
    assert sorted(calls) == sorted(SHAPES)  # none twice
    assert result.table.equals(whole.table)
    assert result.summary == whole.summary
    assert {file.name for file in tmp_path.iterdir()} == {
        "trajectory.parquet", "summary.json", "manifest.json", "report.html"
    }  # fmt: skip
    assert pl.read_parquet(tmp_path / "trajectory.parquet").equals(whole.table)
    size = sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert seen[-1][:2] == (2 * size * 5, 2 * size * 5)
    assert engine.default_jobs() >= 1


def test_not_finite_at_one_checkpoint_only(write_checkpoint, source, tmp_path):
    paths = []
    for step in (1, 2, 3):
        tensors = {name: (values.astype(np.float32) * 1.01).astype(BF16) for name, values in source.items()}
        if step == 2:
            tensors[UP][0, 0] = np.inf
        paths.append(tmp_path / f"step-{step}")
        shutil.move(write_checkpoint(tensors), paths[-1])
    result = deltalens.trajectory(write_checkpoint(source), paths)
    row = result.table.filter((pl.col("key") == UP) & (pl.col("step") == 2)).row(0, named=True)
    assert row["nonfinite_count"] == 1
    assert row["sim16_right_end"] is None
    assert row["jaccard_end"] is None
    assert any("step-2: NaN or Inf" in text for text in result.summary["warnings"])
    json.dumps(result.summary, allow_nan=False)


def test_independent_updates_share_what_rounding_says(write_checkpoint, tmp_path):
    rng = np.random.default_rng(8)
    before = (0.05 * rng.standard_normal((300, 200))).astype(BF16)
    paths = []
    for step in (1, 2):
        paths.append(tmp_path / f"step-{step}")
        after = before.astype(np.float64) + 2e-5 * step * rng.standard_normal(before.shape)
        shutil.move(write_checkpoint({UP: after.astype(BF16)}), paths[-1])
    table = deltalens.trajectory(write_checkpoint({UP: before}), paths).table
    row = table.filter(pl.col("scope") == "global").row(0, named=True)
    assert row["jaccard_end_excess"] == pytest.approx(1, abs=0.05)
    assert row["jaccard_end"] > 1.3 * row["jaccard_end_random"]
    assert row["sim16_right_end"] == pytest.approx(row["sim16_right_end_null"], abs=0.03)


def test_steps(tmp_path):
    for step in (7, 30):
        folder = tmp_path / f"part{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert run_steps([tmp_path / "part30", tmp_path / "part7"]) == ([30, 7], "trainer_state.json")
    assert run_steps(["run/checkpoint-40", "run/checkpoint-100/"]) == ([40, 100], "name")
    assert run_steps(["r/global_step_40/actor", "r/global_step_8/actor"]) == ([40, 8], "name")
    assert run_steps(["r/step-40/model.safetensors", "r/step-8/model.safetensors"]) == ([40, 8], "name")
    assert run_steps([tmp_path / "part7", "run-40"]) == ([7, 40], "name")
    assert run_steps(["SmolLM2-135M-a", "SmolLM2-135M-b"]) == ([1, 2], "position")
    assert run_steps(["a/checkpoint-4", "b/checkpoint-4"]) == ([1, 2], "position")
    assert run_steps(["checkpoint-9", "final"]) == ([1, 2], "position")


def test_command(run, tmp_path):
    path, checkpoints = run
    names = [str(path), *map(str, checkpoints)]
    runner = CliRunner()
    done = runner.invoke(app, ["trajectory", *names, "-o", str(tmp_path / "out"), "--null-draws", "1", "--quiet"])
    assert done.exit_code == 0, done.output
    assert done.output == ""
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    done = runner.invoke(app, ["trajectory", *names, "--spectrum", "none", "--include", "*up_proj*", "--json"])
    summary = json.loads(done.stdout)
    assert summary["tensors"] == 1
    assert summary["locked_at"] is None
    assert [one["step"] for one in summary["checkpoints"]] == [5, 20, 40, 100]
    assert runner.invoke(app, ["trajectory", str(path), str(path)]).exit_code == 2
    assert runner.invoke(app, ["trajectory", *names, "--spectrum", "quick"]).exit_code == 2


def test_what_cannot_be_done_is_said(run, tmp_path):
    path, checkpoints = run
    with pytest.raises(ConfigError, match="two checkpoints"):
        deltalens.trajectory(path, checkpoints[:1])
    with pytest.raises(ConfigError, match="without permutations"):
        deltalens.trajectory(path, checkpoints, settings=deltalens.Settings(permutations=2))
    with pytest.raises(CheckpointError):
        deltalens.trajectory(path, [*checkpoints, tmp_path / "nothing"])
