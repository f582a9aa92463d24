"""`--spectrum fast` against exact on one small pair: agreement, nulls, repeatability."""

from pathlib import Path

import ml_dtypes
import numpy as np
import polars as pl
import pytest
from safetensors.numpy import save_file

from deltalens.analysis import Settings, analyze
from deltalens.analysis.result import AnalysisResult

SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (1000, 700),
    "model.layers.0.mlp.down_proj.weight": (700, 1000),
    "model.layers.0.self_attn.q_proj.weight": (700, 700),
    "model.layers.0.self_attn.k_proj.weight": (80, 700),
}
NULL = ("hill", "spectral_shift", "numerical_rank", "rotation")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(0)
    source, trained = {}, {}
    for name, (m, n) in SHAPES.items():
        edge, r = m**0.5 + n**0.5, min(m, n) // 3
        spikes = (rng.standard_normal((m, r)) * (6 * edge * np.arange(1, r + 1) ** -0.6)) @ rng.standard_normal((r, n))
        weights = (0.02 * (rng.standard_normal((m, n)) + spikes / (m * n) ** 0.5)).astype(ml_dtypes.bfloat16)
        update = rng.standard_normal((m, n)) + 2 * rng.standard_normal((m, 1)) * rng.standard_normal(n)
        source[name] = weights
        trained[name] = (weights.astype(np.float32) + 3e-5 * update).astype(ml_dtypes.bfloat16)
    source["model.layers.0.self_attn.o_proj.weight"] = source["model.layers.0.self_attn.q_proj.weight"]
    trained["model.layers.0.self_attn.o_proj.weight"] = source["model.layers.0.self_attn.q_proj.weight"].copy()
    save_file(source, folder / "source.safetensors")
    save_file(trained, folder / "trained.safetensors")
    return folder / "source.safetensors", folder / "trained.safetensors"


@pytest.fixture(scope="module")
def results(pair: tuple[Path, Path]) -> dict[str, AnalysisResult]:
    return {mode: analyze(*pair, settings=Settings(spectrum=mode)) for mode in ("exact", "fast")}  # type: ignore[arg-type]


def test_within_one_percent_of_exact(results: dict[str, AnalysisResult]) -> None:
    exact, fast = results["exact"].tensors, results["fast"].tensors
    compared = 0
    for name in exact.columns:
        if name.startswith(NULL) or exact[name].dtype == pl.String:
            continue
        a, b = exact[name].to_numpy().astype(float), fast[name].to_numpy().astype(float)
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b), err_msg=name)
        np.testing.assert_allclose(b, a, rtol=0.01, err_msg=name)
        compared += 1
    assert compared > 100


def test_says_which_mode_and_what_it_leaves_out(results: dict[str, AnalysisResult]) -> None:
    exact, fast = results["exact"].tensors, results["fast"].tensors
    assert set(exact["spectrum_mode"]) == {"exact"}
    assert set(fast["spectrum_mode"]) == {"fast"}
    assert results["fast"].summary["settings"]["spectrum"] == "fast"
    for name in (column for column in exact.columns if column.startswith(NULL)):
        assert fast[name].null_count() == fast.height, name
    moved = fast.filter(pl.col("delta_energy") > 0)
    assert moved["effective_rank_error"].null_count() == 0
    assert (moved["effective_rank_error"] < 0.01 * moved["effective_rank"]).all()
    assert (fast["principal_residual_20pct"] < 0.05).all()
    assert fast["principal_residual_20pct"].max() > 0  # the matrices above the direct size are iterated
    assert results["fast"].summary["global"]["hill"] == {"mean": None, "median": None}


def test_the_cache_changes_nothing(pair: tuple[Path, Path], results: dict[str, AnalysisResult], tmp_path: Path) -> None:
    for _ in ("cold", "warm"):
        again = analyze(*pair, settings=Settings(spectrum="fast"), cache=tmp_path)
        assert again.tensors.equals(results["fast"].tensors)
    stored = {file.name for file in tmp_path.iterdir()}
    assert len(stored) == 2 * len(SHAPES)  # two of the five matrices are the same; factors and masks
    analyze(*pair, settings=Settings(spectrum="fast", seed=1), cache=tmp_path)
    analyze(*pair, settings=Settings(), cache=tmp_path)
    assert len({file.name for file in tmp_path.iterdir()}) == 6 * len(SHAPES)  # none is taken for another's


def test_unchanged_matrix_has_no_spectrum(results: dict[str, AnalysisResult]) -> None:
    row = results["fast"].tensors.row(by_predicate=pl.col("name").str.contains("o_proj"), named=True)
    assert row["spectral_norm"] == 0
    assert row["stable_rank"] is row["effective_rank"] is row["principal_projection_10pct"] is None


def test_threads_do_not_change_a_bit(pair: tuple[Path, Path], results: dict[str, AnalysisResult]) -> None:
    again = analyze(*pair, settings=Settings(spectrum="fast"), jobs=1)
    assert again.tensors.equals(results["fast"].tensors)
    assert again.spectra.equals(results["fast"].spectra)


def test_rank_one_update_falls_back_to_exact_values(tmp_path: Path) -> None:
    """What float32 cannot resolve (all but one σ are zero) is taken from float64."""
    rng = np.random.default_rng(0)
    source = rng.standard_normal((700, 700)).astype(np.float32)
    update = np.zeros_like(source)
    update[3] = rng.standard_normal(700)
    save_file({"a.weight": source}, tmp_path / "a.safetensors")
    save_file({"a.weight": source + update}, tmp_path / "b.safetensors")
    settings = Settings(spectrum="fast", compare_dtype="stored")
    row = analyze(tmp_path / "a.safetensors", tmp_path / "b.safetensors", settings=settings).tensors.row(0, named=True)
    assert row["effective_rank"] == pytest.approx(1, abs=1e-6)
    assert row["effective_rank_error"] == 0
    assert row["stable_rank"] == pytest.approx(1)


def test_report_is_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    analyze(*pair, output=tmp_path, settings=Settings(spectrum="fast", null_draws=2))
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert "stable_rank_null" in pl.read_parquet(tmp_path / "tensors.parquet").columns
