"""Whole-process `deltalens analyze` against PyPI's `modeldelta` (spectrum) and `weightscope diff` (counts).

    python benchmarks/bench_analyze.py [SOURCE TRAINED] [--runs 3] [--counts]

`--counts` leaves out all that take a spectrum. Without a pair, it takes the one of `deltalens demo` where that has run
in this folder, else makes one at the shapes of SmolLM2-135M (bf16, 269 MB a side). Runs alternate between the tools;
medians are printed. CPU seconds are user + system over the process tree, memory is the peak of the summed resident
sizes. OPENBLAS_* overrides are removed for all. What each computes:

- modeldelta: the largest singular values of Δ and what follows from them, for matrices; nothing against the source.
- weightscope diff: counts of changed parameters at one threshold.
- deltalens --spectrum exact: all singular values of Δ, of the source and of the trained weights in float64,
  projections, rotations, masks, the rounding null; `none`: counts, energies, magnitude masks, the null.
"""

import argparse
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from processes import Measurement, command, machine, run_process
from safetensors.numpy import save_file

HIDDEN, FFN, LAYERS, VOCABULARY, KEYS_VALUES = 576, 1536, 30, 49_152, 192


def default_pair(folder: Path) -> tuple[Path, Path]:
    """The demo's pair if it is there, else a synthetic one."""
    student = Path("deltalens-demo") / "student"
    if (student / "model.safetensors").exists():
        from deltalens.train.embedded import embedded_model

        return embedded_model(), student
    return synthetic_pair(folder)


def synthetic_pair(folder: Path) -> tuple[Path, Path]:
    """A bf16 pair at SmolLM2-135M's shapes, with tied embeddings; about a quarter of the coordinates differ."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (KEYS_VALUES, HIDDEN) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, FFN)
        shapes |= {f"{layer}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (HIDDEN,)
    rng = np.random.default_rng(0)
    sides: tuple[dict, dict] = {}, {}
    for name, shape in shapes.items():
        weights = np.float32(0.05) * rng.standard_normal(shape, np.float32)
        source = weights.astype(ml_dtypes.bfloat16)
        update = np.float32(3e-5) * rng.standard_normal(shape, np.float32)
        sides[0][name] = source
        sides[1][name] = (source.astype(np.float32) + update).astype(ml_dtypes.bfloat16)
    paths = folder / "source", folder / "trained"
    for path, tensors in zip(paths, sides, strict=True):
        path.mkdir()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", nargs="*", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--counts", action="store_true", help="only the tools that count")
    parser.add_argument("--modeldelta-runs", type=int, help="fewer of the slowest peer; as many as the others if left")
    arguments = parser.parse_args()
    if len(arguments.pair) not in (0, 2):
        parser.error("give SOURCE and TRAINED, or neither")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source, trained = map(str, arguments.pair or default_pair(folder))
        # Each tool writes its report to a file: printing costs none of them anything.
        ours = ["analyze", source, trained, "--fresh", "--quiet", "-o"]
        tools = {
            "weightscope diff": command("weightscope", "diff", source, trained, "-o", str(folder / "diff.md")),
            "deltalens none": command("deltalens", *ours, str(folder / "none"), "--spectrum", "none"),
            "deltalens exact": command("deltalens", *ours, str(folder / "exact"), "--spectrum", "exact"),
            "deltalens fast": command("deltalens", *ours, str(folder / "fast"), "--spectrum", "fast"),
            "modeldelta": command("modeldelta", source, trained, "-q", "-o", str(folder / "delta.json")),
        }
        if arguments.counts:
            tools = {name: tools[name] for name in ("weightscope diff", "deltalens none")}
        run_process(tools["deltalens none"])  # fills the page cache, for everyone
        measured: dict[str, list[Measurement]] = {name: [] for name in tools}
        for run in range(arguments.runs):
            for name, line in tools.items():
                if name == "modeldelta" and run >= (arguments.modeldelta_runs or arguments.runs):
                    continue
                measured[name].append(run_process(line))
    print(f"{machine()}; median of {arguments.runs} alternating runs")
    median = {name: sorted(runs, key=lambda m: m.cpu)[len(runs) // 2] for name, runs in measured.items()}
    print(f"{'':17} {'wall':>9} {'CPU':>9} {'peak RSS':>9}   wall, all runs")
    for name, m in median.items():
        runs = " ".join(f"{run.wall:.1f}" for run in measured[name])
        print(f"{name:17} {m.wall:7.1f} s {m.cpu:7.1f} s {m.peak / 1e9:6.2f} GB   {runs}")
    for mode, peer in (("exact", "modeldelta"), ("fast", "modeldelta"), ("none", "weightscope diff")):
        if peer not in median:
            continue
        a, b = median[peer], median[f"deltalens {mode}"]
        print(
            f"deltalens {mode} ÷ {peer}: {a.wall / b.wall:.1f} × faster (wall), {a.cpu / b.cpu:.1f} × (CPU), "
            f"{b.peak / a.peak:.2f} × the memory"
        )


if __name__ == "__main__":
    main()
