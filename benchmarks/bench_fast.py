"""`--spectrum fast` against `--spectrum exact` at the shapes of Qwen2.5-1.5B, four layers, tied embeddings.

    python benchmarks/bench_fast.py [--layers 4] [--vocabulary 151936] [--folder DIR]

The weights are synthetic: power-law singular values under Gaussian noise for the source, rank 16 plus noise for the
update, rounded to bf16. Both modes run as whole processes of our own command line; OPENBLAS_* overrides are removed.
Prints the ratio of times, what a second run against the same source takes with `--cache`, and for each quantity the
largest and the median relative difference over matrices.
"""

import argparse
import json
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import polars as pl
from processes import command, machine, run_process
from safetensors.numpy import save_file

HIDDEN, FFN, KEYS_VALUES = 1536, 8960, 256
WITHIN = 0.01
COMPARED = ("stable_rank", "effective_rank", "top", "_projection_", "_coverage_")


def shapes(layers: int, vocabulary: int) -> dict[str, tuple[int, int]]:
    out = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for i in range(layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        out |= {f"{attention}.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"}
        out |= {f"{attention}.{name}_proj.weight": (KEYS_VALUES, HIDDEN) for name in "kv"}
        out |= {f"{mlp}.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
        out[f"{mlp}.down_proj.weight"] = (HIDDEN, FFN)
    return out


def low_rank(rng: np.random.Generator, shape: tuple[int, int], values: np.ndarray) -> np.ndarray:
    """A random matrix whose singular values are close to `values`."""
    left = rng.standard_normal((shape[0], values.size), np.float32) / np.float32(shape[0] ** 0.5)
    right = rng.standard_normal((values.size, shape[1]), np.float32) / np.float32(shape[1] ** 0.5)
    return (left * values.astype(np.float32)) @ right


def write_pair(folder: Path, layers: int, vocabulary: int) -> None:
    rng = np.random.default_rng(0)
    source, trained = {}, {}
    for name, shape in shapes(layers, vocabulary).items():
        edge = sum(side**0.5 for side in shape)  # the spectral norm of Gaussian noise of unit variance
        powers = np.arange(1, min(shape) // 4 + 1) ** -0.5
        noise = rng.standard_normal(shape, np.float32)
        weights = np.float32(0.02) * (noise + low_rank(rng, shape, 6 * edge * powers))
        source[name] = weights.astype(ml_dtypes.bfloat16)
        noise = rng.standard_normal(shape, np.float32)
        update = np.float32(2e-5) * (noise + low_rank(rng, shape, 2 * edge * np.arange(1, 17) ** -0.5))
        trained[name] = (source[name].astype(np.float32) + update).astype(ml_dtypes.bfloat16)
    for side, tensors in (("source", source), ("trained", trained)):
        (folder / side).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / side / "model.safetensors")


def differences(exact: pl.DataFrame, fast: pl.DataFrame) -> pl.DataFrame:
    rows = []
    for name in exact.columns:
        if not any(part in name for part in COMPARED) or name.endswith(("_random", "_null", "_excess", "_error")):
            continue
        if name.startswith(("low_magnitude", "top_energy")):
            continue
        a, b = exact[name].to_numpy(), fast[name].to_numpy()
        defined = np.isfinite(a)
        relative = np.abs(b[defined] / a[defined] - 1)
        rows.append({"column": name, "largest": float(relative.max()), "median": float(np.median(relative))})
    return pl.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--runs", type=int, default=1, help="alternating runs of each mode; medians are printed")
    parser.add_argument("--folder", type=Path, help="keep the synthetic pair there, and use it if it is there already")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "trained" / "model.safetensors").exists():
            write_pair(folder, arguments.layers, arguments.vocabulary)
        runs: dict[str, list] = {"exact": [], "fast": []}
        again: dict[str, list] = {"exact": [], "fast": []}
        for _ in range(arguments.runs):
            for mode, measured in runs.items():
                pair = [str(folder / "source"), str(folder / "trained")]
                options = ["--spectrum", mode, "-o", str(Path(temporary) / mode), "--fresh", "--quiet"]
                measured.append(run_process(command("deltalens", "analyze", *pair, *options)))
                options += ["--cache", str(Path(temporary) / f"cache-{mode}")]
                if not again[mode]:
                    run_process(command("deltalens", "analyze", *pair, *options))  # fills it
                again[mode].append(run_process(command("deltalens", "analyze", *pair, *options)))
        tables = {mode: pl.read_parquet(Path(temporary) / mode / "tensors.parquet") for mode in runs}
        summary = json.loads((Path(temporary) / "exact" / "summary.json").read_text())
    print(machine())
    print(f"{summary['source']['parameters'] / 1e6:.0f} M parameters, {2 * summary['source']['bytes'] / 1e9:.2f} GB")
    median, second = (
        {mode: sorted(measured, key=lambda m: m.wall)[len(measured) // 2] for mode, measured in each.items()}
        for each in (runs, again)
    )
    for mode, m in median.items():
        print(f"{mode:6} {m.wall:7.1f} s wall  {m.cpu:7.1f} s CPU  {m.peak / 1e9:5.2f} GB peak")
        warm = second[mode]
        print(
            f"       {warm.wall:7.1f} s wall  {warm.cpu:7.1f} s CPU  {warm.peak / 1e9:5.2f} GB peak with the source's "
            f"factors in --cache: {warm.wall / m.wall:.2f} × (wall), {warm.cpu / m.cpu:.2f} × (CPU)"
        )
    exact, fast = median["exact"], median["fast"]
    print(f"fast is {exact.wall / fast.wall:.1f} × faster (wall), {exact.cpu / fast.cpu:.1f} × (CPU)")
    table = differences(tables["exact"], tables["fast"]).sort("largest", descending=True)
    for row in table.iter_rows(named=True):
        note = "" if row["largest"] <= WITHIN else "  over 1 %"
        print(f"{row['column']:42} largest {row['largest']:.5f}  median {row['median']:.5f}{note}")
    stated = tables["fast"]["effective_rank_error"] / tables["fast"]["effective_rank"]
    print(f"stated relative error of the effective rank: at most {stated.max():.5f}")
    print(f"residual of the 20 % principal subspace: at most {tables['fast']['principal_residual_20pct'].max():.4f}")


if __name__ == "__main__":
    main()
