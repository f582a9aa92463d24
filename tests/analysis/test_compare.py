"""`compare` against brute force on whole arrays, its nulls on runs made independent, its files, its mistakes."""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import ml_dtypes
import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

import deltalens
from deltalens.analysis.runs import run_names
from deltalens.cli import app
from deltalens.errors import CheckpointError

BF16 = ml_dtypes.bfloat16
TAU = float(np.float32(1e-5).astype(BF16))
SHAPES = {
    "model.embed_tokens.weight": (70, 32),
    "model.layers.0.self_attn.q_proj.weight": (32, 32),
    "model.layers.0.mlp.up_proj.weight": (80, 32),
    "model.layers.1.self_attn.q_proj.weight": (32, 32),
    "model.layers.1.mlp.down_proj.weight": (32, 80),
    "model.norm.weight": (32,),
}
ORDER = ("a", "b", "intersection", "jaccard", "a_in_b", "a_in_b_random", "a_in_b_null", "a_in_b_excess", "b_in_a",
         "b_in_a_random", "b_in_a_null", "b_in_a_excess", "sign_agreement", "cosine", "sim16_right",
         "sim16_random")  # fmt: skip


def make_runs(shapes: dict, scales: tuple[float, ...], seed: int = 0, width: float = 0.1) -> list[dict]:
    """A source, then one run a scale: independent updates, rounded once."""
    rng = np.random.default_rng(seed)
    source = {name: (width * rng.standard_normal(shape)).astype(BF16) for name, shape in shapes.items()}
    runs = [
        {
            n: (w.astype(np.float32) + np.float32(s) * rng.standard_normal(w.shape)).astype(BF16)
            for n, w in source.items()
        }
        for s in scales
    ]
    return [source, *runs]


@pytest.fixture(scope="module")
def sides() -> list[dict]:
    """Tensors of very different density, one update that is zero, so that an average of averages is far off."""
    sides = make_runs(SHAPES, (3e-5, 2e-4, 5e-4))
    rng = np.random.default_rng(1)
    name = "model.layers.0.mlp.up_proj.weight"
    shared = (rng.random(SHAPES[name]) < 0.2) * 1e-2 * rng.standard_normal(SHAPES[name])
    for side in sides[1:]:
        side[name] = (side[name].astype(np.float32) + shared.astype(np.float32)).astype(BF16)
    sides[1]["model.norm.weight"] = sides[0]["model.norm.weight"]
    return sides


@pytest.fixture(scope="module")
def folders(sides, write_checkpoint, tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    out = [root / name for name in ("base", "one", "two", "three")]
    for side, folder in zip(sides, out, strict=True):
        write_checkpoint(side, shards=2).rename(folder)
    return out


@pytest.fixture(scope="module")
def result(folders, tmp_path_factory) -> deltalens.CompareResult:
    output = tmp_path_factory.mktemp("out")
    result = deltalens.compare(folders[0], folders[1:], output=output, null_draws=2, jobs=2)
    assert json.loads((output / "summary.json").read_text()) == result.summary
    assert pl.read_parquet(output / "pairs.parquet").equals(result.pairs)
    assert pl.read_parquet(output / "tensors.parquet").equals(result.tensors)
    assert "<html" in (output / "report.html").read_text()
    assert {file.name for file in output.iterdir()} == {
        "summary.json", "pairs.parquet", "tensors.parquet", "report.html", "manifest.json",
    }  # fmt: skip
    return result


def brute(sides: list[dict], i: int, j: int, names: list[str], tau: float) -> dict:
    """The overlap of runs i and j over some tensors from whole arrays of Δ."""
    out = dict.fromkeys(("n", "a", "b", "both", "same", "random", "dot", "ea", "eb"), 0.0)
    sims: dict[str, list[float]] = {"right": [], "left": []}
    x, y = [], []
    for name in names:
        before = sides[0][name]
        da, db = ((sides[k][name] - before).astype(np.float64) for k in (i, j))
        a, b = abs(da) > tau, abs(db) > tau
        both = a & b
        out["n"] += a.size
        out["a"] += a.sum()
        out["b"] += b.sum()
        out["both"] += both.sum()
        out["same"] += (both & (np.sign(da) == np.sign(db))).sum()
        out["random"] += a.mean() * b.mean() * a.size
        out["dot"] += (da * db).sum()
        out["ea"] += (da**2).sum()
        out["eb"] += (db**2).sum()
        x.append(abs(da[both]))
        y.append(abs(db[both]))
        if da.ndim == 2 and da.any() and db.any():
            (ua, _, va), (ub, _, vb) = np.linalg.svd(da), np.linalg.svd(db)
            sims["left"].append(((ua[:, :16].T @ ub[:, :16]) ** 2).sum() / 16)
            sims["right"].append(((va[:16] @ vb[:16].T) ** 2).sum() / 16)
    out |= {f"sim_{side}": np.mean(values) if values else None for side, values in sims.items()}
    out["corr"] = np.corrcoef(np.concatenate(x), np.concatenate(y))[0, 1]
    return out


def scopes() -> dict[tuple[str, str], list[str]]:
    role = {"embed": "embedding", "attn": "attention", "mlp": "ffn", "norm": "norm"}
    out: dict[tuple[str, str], list[str]] = {("global", "all"): list(SHAPES), ("core", "all"): list(SHAPES)[1:]}
    for name in SHAPES:
        out.setdefault(("role", next(r for part, r in role.items() if part in name)), []).append(name)
        out.setdefault(("module", name.split(".")[-2]), []).append(name)
        if "layers" in name:
            out.setdefault(("layer", name.split(".")[2]), []).append(name)
    return out


@pytest.mark.parametrize(("kind", "tau"), [("", TAU), ("_nonzero", 0.0)])
def test_every_scope_is_what_whole_arrays_give(result, sides, kind, tau):
    names = ["one", "two", "three"]
    rows = {(r["a"], r["b"], r["scope"], r["key"]): r for r in result.pairs.iter_rows(named=True)}
    wanted = scopes()
    assert {key[2:] for key in rows} == set(wanted)
    assert len(rows) == 3 * len(wanted)
    for i, j in combinations(range(3), 2):
        for scope, members in wanted.items():
            row = rows[(names[i], names[j], *scope)]
            if scope[1] == "norm":
                continue  # one of the updates is zero there: below
            want = brute(sides, i + 1, j + 1, members, tau)
            assert (row["parameters"], row[f"intersection{kind}"]) == (want["n"], want["both"])
            assert row[f"union{kind}"] == want["a"] + want["b"] - want["both"]
            pairs = {
                f"density_a{kind}": want["a"] / want["n"],
                f"density_b{kind}": want["b"] / want["n"],
                f"jaccard{kind}": want["both"] / (want["a"] + want["b"] - want["both"]),
                f"a_in_b{kind}": want["both"] / want["a"],
                f"b_in_a{kind}": want["both"] / want["b"],
                f"a_in_b{kind}_random": want["random"] / want["a"],
                f"b_in_a{kind}_random": want["random"] / want["b"],
                f"lift{kind}": want["both"] / want["random"],
                f"sign_agreement{kind}": want["same"] / want["both"],
                "cosine": want["dot"] / np.sqrt(want["ea"] * want["eb"]),
            }
            for side in ("right", "left"):
                pairs[f"sim16_{side}"] = want[f"sim_{side}"]
            if kind == "":
                pairs["magnitude_correlation"] = want["corr"]
            for name, value in pairs.items():
                assert row[name] == (None if value is None else pytest.approx(value, rel=1e-6, abs=1e-6)), name


def test_what_is_undefined_is_null(result):
    row = result.pairs.filter(pl.col("a") == "one", scope="role", key="norm").row(0, named=True)
    for name in ("a_in_b", "a_in_b_null", "a_in_b_excess", "sign_agreement", "cosine", "sim16_right", "lift"):
        assert row[name] is None, name
    assert row["b_in_a"] == 0.0
    assert not any(result.pairs[name].is_nan().any() for name, kind in result.pairs.schema.items() if kind.is_float())


def test_random_similarity_is_k_over_the_dimension(result):
    row = result.pairs.filter(scope="module", key="down_proj").row(0, named=True)
    assert row["sim16_right_random"] == row["sim16_random"] == 16 / 80
    assert row["sim16_left_random"] == 16 / 32


def test_the_summary_has_the_keys_of_its_schema(result, folders):
    summary = result.summary
    assert summary["schema"] == 1
    assert [(run["name"], run["path"]) for run in summary["runs"]] == [(f.name, str(f)) for f in folders[1:]]
    assert [(pair["a"], pair["b"]) for pair in summary["pairs"]] == list(combinations(["one", "two", "three"], 2))
    for pair in summary["pairs"]:
        assert set(ORDER) <= set(pair)
        assert pair["core"]["parameters"] == pair["parameters"] - 70 * 32
        assert pair["density_b"] == {r["name"]: r["density"] for r in summary["runs"]}[pair["b"]]
        assert pair["a_in_b_excess_low"] < pair["a_in_b_excess"] < pair["a_in_b_excess_high"]
        assert pair["a_in_b_excess"] == pair["b_in_a_excess"]
    assert {"a", "b", "scope", "key", *ORDER} <= set(result.pairs.columns)
    assert result.tensors.height == 3 * len(SHAPES)
    assert "one in two" in repr(result)


def test_independent_runs_overlap_as_rounding_alone_says(write_checkpoint):
    """Σ P_A P_B holds where p_A·p_B does not; the excess is a ratio of sums over tensors of different spread."""
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (300, 500) for i in range(3)}
    source, one, other = (write_checkpoint(side) for side in make_runs(shapes, (8e-5, 2.5e-4), seed=2))
    pair = deltalens.compare(source, [one, other], null_draws=0).summary["pairs"][0]
    for kind in ("", "_nonzero"):
        assert pair[f"a_in_b{kind}_excess"] == pytest.approx(1, abs=0.02)
        assert pair[f"lift{kind}"] > 1.15
        assert pair[f"a_in_b{kind}_null"] == pytest.approx(pair[f"a_in_b{kind}"], rel=0.02)
        assert pair[f"jaccard{kind}_null"] == pytest.approx(pair[f"jaccard{kind}"], rel=0.02)
        assert pair[f"sign_agreement{kind}"] == pytest.approx(0.5, abs=0.01)
    assert pair["magnitude_correlation_null"] == pytest.approx(pair["magnitude_correlation"], abs=0.02)
    assert abs(pair["cosine"]) < 0.01


def test_the_simulated_null_is_what_independent_runs_have(write_checkpoint):
    """A source with a few large rows, whose spacing alone gives the updates a direction to share."""
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (64, 200) for i in range(8)}
    source, *runs = make_runs(shapes, (1e-4, 1e-4), seed=3, width=0.01)
    scale = np.where(np.arange(200) < 12, 1e-3, 1.0).astype(np.float32)
    rng = np.random.default_rng(4)
    for name in shapes:
        source[name] = (scale * source[name].astype(np.float32) * 40).astype(BF16)
        for run in runs:
            noise = 2e-4 * rng.standard_normal(shapes[name])
            run[name] = (source[name].astype(np.float32) + noise.astype(np.float32)).astype(BF16)
    folders = [write_checkpoint(side) for side in (source, *runs)]
    pair = deltalens.compare(folders[0], folders[1:], null_draws=4).summary["pairs"][0]
    assert pair["sim16_right"] > 1.2 * pair["sim16_random"]
    assert pair["sim16_right_excess"] == pytest.approx(1, abs=0.06)
    assert pair["sim16_left_excess"] == pytest.approx(1, abs=0.06)
    assert 0 < pair["sim16_right_null_std"] < 0.05


def test_a_planted_mask_shows_beside_both(write_checkpoint):
    shapes = {"model.layers.0.mlp.up_proj.weight": (200, 400)}
    source, *runs = make_runs(shapes, (8e-5, 2.5e-4), seed=5)
    planted = np.random.default_rng(6).random((200, 400)) < 0.1
    runs = [{n: np.where(planted, w, source[n]) for n, w in run.items()} for run in runs]
    folders = [write_checkpoint(side) for side in (source, *runs)]
    pair = deltalens.compare(folders[0], folders[1:], null_draws=0).summary["pairs"][0]
    assert pair["a_in_b_excess"] > 1.3
    assert pair["lift"] > 1.5


def test_rows_do_not_depend_on_threads_or_on_being_cut_short(folders, tmp_path, result):
    with pytest.raises(KeyboardInterrupt):
        deltalens.compare(*(folders[0], folders[1:]), output=tmp_path, null_draws=2, jobs=1, progress=_stop_after(3))
    journal = (tmp_path / ".deltalens-partial" / "rows.jsonl").read_text().splitlines()
    assert 0 < len(journal) < len(SHAPES)
    seen: list[int] = []
    again = deltalens.compare(
        folders[0], folders[1:], output=tmp_path, null_draws=2, jobs=1, progress=lambda done, *_: seen.append(done)
    )
    assert seen[0] > 0  # taken up, not begun again
    assert again.summary == result.summary
    assert again.pairs.equals(result.pairs)
    assert not (tmp_path / ".deltalens-partial").exists()


def _stop_after(count: int):
    def progress(done, total, name, calls=[]):  # noqa: B006  # a counter
        calls.append(name)
        if len(calls) > count:
            raise KeyboardInterrupt

    return progress


def test_two_orders_of_runs_agree(folders, result):
    swapped = deltalens.compare(folders[0], [folders[2], folders[1]], null_draws=0).summary["pairs"][0]
    pair = result.summary["pairs"][0]
    for name in ("a_in_b", "a_in_b_null", "a_in_b_random"):
        assert swapped[name] == pytest.approx(pair[name.replace("a_in_b", "b_in_a")], rel=1e-12)
    assert swapped["jaccard"] == pair["jaccard"]
    assert swapped["sim16_right"] == pytest.approx(pair["sim16_right"], rel=1e-6)


def test_a_tensor_that_one_run_lacks_is_compared_in_none(sides, folders, write_checkpoint):
    name, reshaped = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    other = {n: w for n, w in sides[2].items() if n != name}
    other[reshaped] = other[reshaped][:, :16]
    result = deltalens.compare(folders[0], [folders[1], write_checkpoint(other)], null_draws=0)
    assert not {name, reshaped} & set(result.tensors["name"])
    reasons = {entry["tensor"]: entry["reason"] for entry in result.summary["skipped"]}
    assert {name, reshaped} <= set(reasons)


def test_vocabularies_are_cut_to_the_smallest(sides, folders, write_checkpoint):
    name = "model.embed_tokens.weight"
    shorter, shortest = ({**side, name: side[name][:rows]} for side, rows in zip(sides[1:3], (64, 50), strict=True))
    runs = [write_checkpoint(shorter), write_checkpoint(shortest)]
    result = deltalens.compare(folders[0], runs, null_draws=0, include=["*embed*"])
    cut = [{name: side[name][:50]} for side in sides[:3]]
    want = brute(cut, 1, 2, [name], TAU)
    assert result.tensors["shape"].to_list() == ["50x32"]
    assert result.summary["pairs"][0]["intersection"] == want["both"]


def test_non_finite_tensors_are_left_out_and_named(sides, folders, write_checkpoint):
    name = "model.layers.0.self_attn.q_proj.weight"
    broken = dict(sides[2])
    broken[name] = broken[name].copy()
    broken[name][3, 4] = np.nan
    summary = deltalens.compare(folders[0], [folders[1], write_checkpoint(broken)], null_draws=0).summary
    assert any(name in warning for warning in summary["warnings"])
    want = brute(sides, 1, 2, [n for n in SHAPES if n != name], TAU)
    assert summary["pairs"][0]["intersection"] == want["both"]


def test_runs_without_a_finite_tensor_are_an_error(write_checkpoint, tmp_path):
    source, run = ({"model.norm.weight": np.full(4, value).astype(BF16)} for value in (1.0, np.nan))
    folders = [write_checkpoint(one) for one in (source, run, source)]
    with pytest.raises(CheckpointError, match=r"NaN or Inf in each of the 1 tensors, among them model\.norm"):
        deltalens.compare(folders[0], folders[1:], output=tmp_path / "out", null_draws=0)


@pytest.mark.parametrize("dtype", ["stored", "fp32", "bf16"])
def test_float32_checkpoints(sides, write_checkpoint, dtype):
    rng = np.random.default_rng(8)
    source = {n: w.astype(np.float32) + np.float32(1e-5) * rng.standard_normal(w.shape) for n, w in sides[0].items()}
    source = {n: w.astype(np.float32) for n, w in source.items()}
    runs = [
        {n: (w + s * rng.standard_normal(w.shape)).astype(np.float32) for n, w in source.items()} for s in (1e-5, 2e-4)
    ]
    folders = [write_checkpoint(side) for side in (source, *runs)]
    result = deltalens.compare(folders[0], folders[1:], compare_dtype=dtype, null_draws=1)
    cast = BF16 if dtype == "bf16" else np.float32
    tau = TAU if dtype == "bf16" else float(np.float32(1e-5))
    want = brute([{n: w.astype(cast) for n, w in side.items()} for side in (source, *runs)], 1, 2, list(SHAPES), tau)
    pair = result.summary["pairs"][0]
    assert pair["intersection"] == want["both"]
    assert pair["sign_agreement"] == want["same"] / want["both"]
    assert pair["a_in_b_excess"] == pytest.approx(1, abs=0.1)
    assert any("finer than bf16" in warning for warning in result.summary["warnings"]) == (dtype == "bf16")


def test_a_run_of_another_source_is_named(folders, write_checkpoint):
    other = write_checkpoint(make_runs(SHAPES, (1e-4,), seed=9)[1])
    warnings = deltalens.compare(folders[0], [folders[1], other], null_draws=0).summary["warnings"]
    assert [w.split(":")[0] for w in warnings if "probably not trained from" in w] == [other.name]


def test_names_are_unique():
    assert run_names(["a/x", "b/y"]) == ("x", "y")
    assert run_names(["a/x/", "b/x", "c"]) == ("a/x", "b/x", "c")
    assert run_names(["q/a/x", "r/a/x", "b/x"]) == ("q/a/x", "r/a/x", "b/x")
    assert run_names(["x", "x"]) == ("x", "x-2")
    assert run_names(["org/model@main", "org/model@step10"]) == ("model@main", "model@step10")


def test_mistakes_are_errors_that_say_what_to_do(folders, tmp_path):
    with pytest.raises(deltalens.errors.ConfigError, match="analyze"):
        deltalens.compare(folders[0], folders[1:2])
    with pytest.raises(deltalens.errors.CheckpointError, match="no such file"):
        deltalens.compare(folders[0], [folders[1], tmp_path / "nothing"])
    with pytest.raises(ValueError, match="compare dtype"):
        deltalens.compare(folders[0], folders[1:], compare_dtype="fp8")
    (tmp_path / "file").write_text("")
    with pytest.raises(deltalens.errors.DeltalensError, match="-o"):
        deltalens.compare(folders[0], folders[1:], output=tmp_path / "file")


def test_the_command(folders, tmp_path):
    paths = [str(folder) for folder in folders]
    runner = CliRunner()
    done = runner.invoke(app, ["compare", *paths, "--json", "--null-draws", "0", "--threshold", "1e-4",
                               "--exclude", "*norm*"])  # fmt: skip
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert len(summary["pairs"]) == 3
    assert summary["settings"]["threshold"] == 1e-4
    assert summary["tensors"] == len(SHAPES) - 1
    shown = runner.invoke(app, ["compare", *paths[:3], "--null-draws", "0"])
    assert shown.exit_code == 0
    assert shown.stdout == ""
    assert "one in two" in shown.stderr
    assert "by role" in shown.stderr
    quiet = runner.invoke(app, ["compare", *paths[:3], "--quiet", "--null-draws", "0", "-o", str(tmp_path / "out")])
    assert (quiet.exit_code, quiet.output) == (0, "")
    assert (tmp_path / "out" / "report.html").is_file()
    assert runner.invoke(app, ["compare", *paths[:2]]).exit_code == 2
    assert runner.invoke(app, ["compare", *paths, "--compare-dtype", "fp8"]).exit_code == 2


def test_compare_imports_no_torch(folders):
    code = f"""
import sys, deltalens
deltalens.compare({str(folders[0])!r}, {[str(f) for f in folders[1:3]]!r}, null_draws=1, include=["*q_proj*"])
assert not {{"torch", "transformers", "trl", "plotly"}} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
