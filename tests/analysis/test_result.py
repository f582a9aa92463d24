"""What `analyze` returns: tables, the summary of DESIGN.md, the report, a readable repr; aggregates recomputed."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import polars as pl
import pytest
from twin import twin_row

import deltalens

BF16 = ml_dtypes.bfloat16
MATRICES = {
    "model.embed_tokens.weight": (60, 24),
    "model.layers.0.self_attn.q_proj.weight": (24, 24),
    "model.layers.0.mlp.up_proj.weight": (48, 24),
    "model.layers.1.self_attn.q_proj.weight": (24, 24),
    "model.layers.1.mlp.down_proj.weight": (24, 48),
    "lm_head.weight": (60, 24),
}
NORM = "model.norm.weight"
SPREADS = ("stable_rank", "effective_rank", "numerical_rank_fraction_1e-4", "top16_energy", "top8_energy",
           "principal_projection_10pct", "rotation_10pct", "spectral_shift")  # fmt: skip
COVERAGES = ("principal_coverage_10pct", "low_magnitude_coverage_10pct")
SIDE = {"path", "format", "files", "bytes", "parameters"}


@pytest.fixture(scope="module")
def sides() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Updates of very different size, so that an average of averages is far from the truth."""
    rng = np.random.default_rng(7)
    before, after = {}, {}
    for i, (name, shape) in enumerate(MATRICES.items()):
        d = min(shape)
        u, v = (np.linalg.qr(rng.standard_normal((side, d)))[0] for side in shape)
        before[name] = ((u * 0.8 ** np.arange(d)) @ v.T).astype(BF16)
        delta = 10.0 ** (-2 - 0.4 * i) * rng.standard_normal(shape) * (rng.random(shape) < 0.15 * (i + 1))
        after[name] = (before[name].astype(np.float64) + delta).astype(BF16)
    before[NORM] = np.ones(24, BF16)
    after[NORM] = (1 + 0.02 * rng.standard_normal(24)).astype(BF16)
    return before, after


@pytest.fixture(scope="module")
def result(sides, write_checkpoint) -> deltalens.AnalysisResult:
    before, after = ({**side, "model.steps": np.arange(3)} for side in sides)
    return deltalens.analyze(write_checkpoint(before, shards=3), write_checkpoint(after))


def check_keys(summary: dict) -> None:
    assert list(summary) == ["schema", "deltalens", "source", "trained", "settings", "global", "by_role", "by_layer",
                             "skipped", "warnings"]  # fmt: skip
    assert summary["schema"] == 1
    assert summary["deltalens"] == deltalens.__version__
    for side in ("source", "trained"):
        assert set(summary[side]) == SIDE
    overall = summary["global"]
    plain = {"tensors", "parameters", "relative_norm", "unchanged_fraction", "unchanged_bits", "sparsity",
             "sparsity_at", "relative_sparsity", "top_energy_1pct", "energy_share"}  # fmt: skip
    assert plain <= set(overall)
    assert list(overall["sparsity_at"]) == ["1e-08", "1e-07", "1e-06", "1e-05", "1e-04"]
    assert list(overall["energy_share"]) == ["ffn", "attention", "embedding", "lm_head", "norm", "vision", "other"]
    for name in SPREADS:
        assert {"mean", "median"} <= set(overall[name]), name
    for name in (*COVERAGES, *(f"{c}_core" for c in COVERAGES), *(f"{c}_nonzero" for c in COVERAGES)):
        wanted = {"pooled", "median", "random", "null", "excess", "excess_low", "excess_high"}
        assert wanted <= set(overall[name]), name
    assert {entry for skipped in summary["skipped"] for entry in skipped} <= {"tensor", "reason"}


def test_the_summary_has_the_keys_of_its_schema(result):
    check_keys(result.summary)
    assert set(result.summary["by_role"]) == {"ffn", "attention", "embedding", "lm_head", "norm"}
    assert set(result.summary["by_layer"]) == {"0", "1"}
    assert [entry["tensor"] for entry in result.summary["skipped"]] == ["model.steps"]
    assert "I64" in result.summary["skipped"][0]["reason"]
    assert result.summary["source"]["files"] == 3
    assert result.summary["source"]["parameters"] == sum(m * n for m, n in MATRICES.values()) + 24 + 3


@pytest.mark.parametrize("role", [None, "attention", "ffn"])
def test_aggregates_are_those_of_the_whole(result, sides, role):
    """Recomputed from all coordinates laid end to end, and from sums of counts."""
    before, after = sides
    of_role = {"attention": "self_attn", "ffn": "mlp"}
    names = [name for name in before if role is None or of_role[role] in name]
    source = np.concatenate([before[name].astype(np.float64).ravel() for name in names])
    delta = np.concatenate([(after[name] - before[name]).astype(np.float64).ravel() for name in names])
    tau = float(BF16(1e-5))
    got = result.summary["global"] if role is None else result.summary["by_role"][role]
    assert (got["tensors"], got["parameters"]) == (len(names), source.size)
    assert got["relative_norm"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(source))
    assert got["unchanged_fraction"] == (delta == 0).mean()
    assert got["sparsity"] == (np.abs(delta) <= tau).mean()
    for key, share in got["sparsity_at"].items():
        assert share == (np.abs(delta) <= float(BF16(float(key)))).mean(), key
    assert got["visible_updates"] == np.count_nonzero(np.abs(delta) > tau)

    rows = {name: twin_row(before[name], after[name]) for name in names if name != NORM}
    top = 0.0
    for name in names:
        squares = np.sort((after[name] - before[name]).astype(np.float64).ravel() ** 2)[::-1]
        top += squares[: int(np.ceil(squares.size / 100 - 1e-9))].sum()
    assert got["top_energy_1pct"] == pytest.approx(top / (delta**2).sum())
    for column in set(SPREADS) - {"numerical_rank_fraction_1e-4"}:
        values = [row[column] for row in rows.values()]
        assert got[column]["mean"] == pytest.approx(np.mean(values), rel=1e-7), column
        assert got[column]["median"] == pytest.approx(np.median(values), rel=1e-7), column
    for kind, counts in (("", "visible"), ("_nonzero", "nonzero")):
        updates = {
            name: np.count_nonzero(
                np.abs((after[name] - before[name]).astype(np.float64)) > (tau if counts == "visible" else 0)
            )
            for name in rows
        }
        for coverage in COVERAGES:
            column = coverage + kind
            core = [name for name in rows if name not in ("model.embed_tokens.weight", "lm_head.weight")]
            for key, used in ((column, list(rows)), (f"{column}_core", core)):
                if role is not None and key.endswith("_core"):
                    continue
                total = sum(updates[name] for name in used)
                inside = sum(rows[name][column] * updates[name] for name in used)
                expected = sum(rows[name][f"{column}_null"] * updates[name] for name in used)
                chance = sum(rows[name][f"{column}_random"] * updates[name] for name in used)
                assert got[key]["pooled"] == pytest.approx(inside / total), key
                assert got[key]["median"] == pytest.approx(np.median([rows[name][column] for name in used])), key
                assert got[key]["random"] == pytest.approx(chance / total), key
                assert got[key]["null"] == pytest.approx(expected / total, rel=1e-6), key
                assert got[key]["excess"] == pytest.approx(inside / expected, rel=1e-6), key
                if role is None:
                    assert got[key]["excess_low"] < got[key]["excess"] < got[key]["excess_high"], key


def test_energy_shares_add_up(result, sides):
    before, after = sides
    energies = {name: ((after[name] - before[name]).astype(np.float64) ** 2).sum() for name in before}
    shares = result.summary["global"]["energy_share"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["embedding"] == pytest.approx(energies["model.embed_tokens.weight"] / sum(energies.values()))
    assert shares["norm"] == pytest.approx(energies[NORM] / sum(energies.values()))
    assert (shares["vision"], shares["other"]) == (0.0, 0.0)
    for role, group in result.summary["by_role"].items():
        assert group["energy_share"] == pytest.approx(shares[role])
    first = sum(energy for name, energy in energies.items() if "layers.0" in name)
    assert result.summary["by_layer"]["0"]["energy_share"] == pytest.approx(first / sum(energies.values()))


def test_the_table(result):
    table = result.tensors
    assert isinstance(table, pl.DataFrame)
    assert table.columns[:6] == ["name", "layer", "role", "module", "shape", "parameters"]
    assert set(table["name"]) == {*MATRICES, NORM}
    row = table.row(by_predicate=pl.col("name") == "model.layers.1.mlp.down_proj.weight", named=True)
    assert (row["layer"], row["role"], row["module"]) == (1, "ffn", "down_proj")
    assert (row["shape"], row["parameters"]) == ("24x48", 1152)
    norm = table.row(by_predicate=pl.col("name") == NORM, named=True)
    assert norm["layer"] is None
    assert norm["stable_rank"] is None  # a vector has no spectrum
    assert norm["relative_norm"] > 0
    assert not table.select(pl.selectors.float().is_nan().any()).row(0).count(True)


def test_saved_files_hold_what_the_result_holds(result, tmp_path):
    out = result.save(tmp_path / "saved")
    assert pl.read_parquet(out / "tensors.parquet").equals(result.tensors)
    assert pl.read_parquet(out / "spectra.parquet").equals(result.spectra)
    assert json.loads((out / "summary.json").read_text()) == result.summary
    check_keys(json.loads((out / "summary.json").read_text()))
    assert json.loads((out / "manifest.json").read_text()) == result.manifest
    assert not [file for file in out.iterdir() if file.name.startswith(".")]
    mode = {file.name: file.stat().st_mode & 0o444 for file in out.iterdir()}
    assert set(mode.values()) == {0o444}, mode
    result.save(out)  # again, over the old


def test_the_report_is_one_file_that_needs_no_network(result, tmp_path):
    page = Path(result.to_html(tmp_path / "report.html")).read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "model.layers.1.mlp.down_proj.weight" in page
    assert 'src="http' not in page
    assert 'rel="stylesheet" href="http' not in page


def test_repr_is_a_few_readable_lines(result):
    text = repr(result)
    assert 1 <= text.count("\n") + 1 <= 20
    assert max(map(len, text.splitlines())) <= 140
    assert "NaN" not in text
    assert "7" in text  # tensors


def test_spectrum_none_keeps_what_needs_no_spectrum(result, sides, write_checkpoint, tmp_path):
    before, after = write_checkpoint(sides[0], shards=3), write_checkpoint(sides[1])  # rows in the same order
    bare = deltalens.analyze(before, after, settings=deltalens.Settings(spectrum="none"), output=tmp_path / "out")
    full, quick = result.tensors, bare.tensors
    assert "stable_rank" not in quick.columns
    assert "low_magnitude_coverage_10pct_excess" in quick.columns
    assert quick.equals(full.select(quick.columns))
    assert bare.spectra.height == 0
    assert bare.manifest["blake3"] == {}
    for name in ("relative_norm", "sparsity", "top_energy_1pct", "low_magnitude_coverage_10pct_core"):
        assert bare.summary["global"][name] == result.summary["global"][name], name
    check_keys(bare.summary)


def test_a_pair_that_is_not_one_is_warned_of(write_checkpoint):
    rng = np.random.default_rng(0)
    one, other = (
        write_checkpoint({name: rng.standard_normal(shape).astype(BF16) for name, shape in MATRICES.items()})
        for _ in range(2)
    )
    assert any("probably not" in w for w in deltalens.analyze(one, other).summary["warnings"])
    assert deltalens.analyze(one, one).summary["warnings"] == []


def test_a_cast_that_makes_the_sparsity_is_warned_of(write_checkpoint):
    rng = np.random.default_rng(0)
    before = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in MATRICES.items()}
    after = {name: values * np.float32(1 + 1e-6) for name, values in before.items()}
    source, trained = write_checkpoint(before), write_checkpoint(after)
    cast = deltalens.analyze(source, trained)
    assert any("stored finer than bf16" in warning for warning in cast.summary["warnings"])
    assert cast.summary["global"]["unchanged_fraction"] > 0.99
    stored = deltalens.analyze(source, trained, settings=deltalens.Settings(compare_dtype="stored"))
    assert stored.summary["warnings"] == []
    assert stored.summary["global"]["unchanged_fraction"] < 0.01


def test_settings_that_cannot_be():
    for wrong in (
        {"threshold": -1.0}, {"threshold": float("nan")}, {"ratios": (0.0,)}, {"ratios": (1.0,)}, {"mask_rank": 0},
        {"mask_share": 1.5}, {"null_draws": -1}, {"compare_dtype": "int8"}, {"spectrum": "half"},
    ):  # fmt: skip
        with pytest.raises(ValueError):  # noqa: PT011  # each has its own words
            deltalens.Settings(**wrong)
    assert deltalens.Settings(ratios=(0.2, 0.01)).ratios == (0.01, 0.1, 0.2)
