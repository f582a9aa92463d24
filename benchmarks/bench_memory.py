"""Peak memory of `--spectrum none` on a sharded 8-billion-parameter bf16 pair, and how long exact mode would take.

    python benchmarks/bench_memory.py FOLDER [--layers 32] [--scale 1]

The pair (2 × 16 GB) is written to FOLDER once, at the shapes of Llama-3-8B, and reused. `--layers 16` writes fewer
layers (2 × 9 GB): the peak is that of the whole model, since the embedding and the head make it. `--scale 0.125` writes
an eighth of the layers and of the vocabulary. The peer is `weightscope diff`, which reads the same pair (`--no-peer`
leaves it out).

Exact mode is timed on one matrix of each shape but the embedding's. CPU seconds of a matrix with sides a ≥ b are taken
as x·a·b² + y·b³ (products, and factorisations of b × b); x and y come from the square one and the tallest one, the
third shape shows how good that is, and all matrices of the 32-layer model are summed.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from processes import Measurement, command, machine, run_process
from safetensors.numpy import save_file

from deltalens.analysis.engine import default_jobs

HIDDEN, FFN, LAYERS, VOCABULARY, KEYS_VALUES = 4096, 14_336, 32, 128_256, 1024
LIMIT = 3e9
SPARE = 4e9  # bytes of the disk that are left alone


def layer_shapes(i: int) -> dict[str, tuple[int, ...]]:
    layer = f"model.layers.{i}"
    out: dict[str, tuple[int, ...]] = {f"{layer}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"}
    out |= {f"{layer}.self_attn.{name}_proj.weight": (KEYS_VALUES, HIDDEN) for name in "kv"}
    out |= {f"{layer}.mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
    out[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, FFN)
    return out | {f"{layer}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}


def shards(scale: float = 1.0, layers: int = LAYERS) -> list[dict[str, tuple[int, ...]]]:
    """Shapes a shard: the embedding, every layer, the head."""
    vocabulary, layers = max(1, round(scale * VOCABULARY)), max(1, round(scale * layers))
    last: dict[str, tuple[int, ...]] = {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocabulary, HIDDEN)}
    return [{"model.embed_tokens.weight": (vocabulary, HIDDEN)}, *map(layer_shapes, range(layers)), last]


def write_pair(folder: Path, plan: list[dict[str, tuple[int, ...]]]) -> None:
    """Both sides, shard by shard; `model.safetensors.index.json` comes last and says that a side is complete."""
    sides = folder / "source", folder / "trained"
    if all((side / "model.safetensors.index.json").exists() for side in sides):
        return
    needed = 4 * sum(int(np.prod(shape)) for shard in plan for shape in shard.values())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE:
        raise SystemExit(f"{folder}: {needed / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free; try --layers 16")
    names: dict[str, str] = {}
    # One draw of 16 million weights, repeated: drawing all of them anew would take far longer than anything measured.
    rng = np.random.default_rng(0)
    drawn = np.float32(0.02) * rng.standard_normal(1 << 24, np.float32)
    source = drawn.astype(ml_dtypes.bfloat16)
    update = np.float32(1.5e-5) * rng.standard_normal(drawn.size, np.float32)
    trained = (source.astype(np.float32) + update).astype(ml_dtypes.bfloat16)
    for i, shard in enumerate(plan):
        file = f"model-{i + 1:05}-of-{len(plan):05}.safetensors"
        names |= dict.fromkeys(shard, file)
        # One tensor begins where another does not, or all of a shape would have the same spectrum.
        tensors = [
            {name: np.resize(np.roll(pool, 997 * (i + j)), shape) for j, (name, shape) in enumerate(shard.items())}
            for pool in (source, trained)
        ]
        for side, values in zip(sides, tensors, strict=True):
            side.mkdir(exist_ok=True)
            save_file(values, side / file, metadata={"format": "pt"})
    for side in sides:
        index = {"metadata": {"total_size": needed // 2}, "weight_map": names}
        (side / "model.safetensors.index.json").write_text(json.dumps(index))


def analyze(folder: Path, *options: str) -> Measurement:
    pair = [str(folder / side) for side in ("source", "trained")]
    with tempfile.TemporaryDirectory() as output:
        return run_process(command("deltalens", "analyze", *pair, "-o", output, "--quiet", *options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--no-peer", action="store_true")
    arguments = parser.parse_args()
    if arguments.folder is None:
        print(
            "bench_memory: left out, it writes 32 GB; give it a FOLDER (and --layers 16 for 18 GB, --scale 0.125 for 4)"
        )
        return
    plan = shards(arguments.scale, arguments.layers)
    folder = arguments.folder / f"scale-{arguments.scale:g}-layers-{arguments.layers}"
    write_pair(folder, plan)
    parameters = sum(int(np.prod(shape)) for shard in plan for shape in shard.values())
    largest = max(int(np.prod(shape)) for shard in plan for shape in shard.values())
    print(machine())
    print(f"{parameters / 1e9:.2f} billion parameters, {4 * parameters / 1e9:.1f} GB, {len(plan)} shards a side")
    ours = analyze(folder, "--spectrum", "none")
    report("deltalens none", ours, parameters)
    bound = 500e6 + 16 * largest
    print(
        f"peak {ours.peak / 1e9:.2f} GB: limits are {LIMIT / 1e9:.0f} GB, and 0.5 GB + 4 × the largest tensor in "
        f"float32 = {bound / 1e9:.2f} GB"
    )
    if not arguments.no_peer:
        pair = [str(folder / side) for side in ("source", "trained")]
        with tempfile.TemporaryDirectory() as output:
            peer = run_process(command("weightscope", "diff", *pair, "-o", f"{output}/diff.md"))
        report("weightscope diff", peer, parameters)
        print(
            f"deltalens none ÷ weightscope diff: {peer.wall / ours.wall:.1f} × faster (wall), "
            f"{peer.cpu / ours.cpu:.1f} × (CPU), {ours.peak / peer.peak:.2f} × the memory"
        )
    extrapolate(folder)
    if ours.peak > LIMIT:
        sys.exit("over the limit")


def extrapolate(folder: Path) -> None:
    """Print what exact mode takes of a matrix of each shape, and of the whole 32-layer model."""
    start = analyze(folder, "--spectrum", "none", "--include", "model.norm.weight")  # what a process costs by itself
    taken: dict[str, Measurement] = {}
    for name in ("self_attn.k_proj", "self_attn.q_proj", "mlp.up_proj"):
        taken[name] = analyze(folder, "--spectrum", "exact", "--include", f"model.layers.0.{name}.weight")

    def work(shape: tuple[int, ...]) -> np.ndarray:
        return np.array([max(shape) * min(shape) ** 2, min(shape) ** 3], float)

    shapes = {name: layer_shapes(0)[f"model.layers.0.{name}.weight"] for name in taken}
    spent = {name: m.cpu - start.cpu for name, m in taken.items()}
    fitted = ("self_attn.q_proj", "mlp.up_proj")
    law = np.linalg.solve([work(shapes[name]) for name in fitted], [spent[name] for name in fitted])
    for name, m in taken.items():
        print(
            f"exact mode, {name:17} {shapes[name][0]:6} × {shapes[name][1]}: {spent[name]:6.1f} s CPU, "
            f"{1e9 * spent[name] / np.prod(shapes[name]):5.0f} ns an element, {m.peak / 1e9:.2f} GB peak; "
            f"the law says {work(shapes[name]) @ law:.1f} s"
        )
    matrices = [shape for shard in shards() for shape in shard.values() if len(shape) == 2]
    seconds = sum(float(work(shape) @ law) for shape in matrices)
    cores = default_jobs()
    print(
        f"extrapolated to the 32-layer model, {sum(map(np.prod, matrices)) / 1e9:.2f} billion parameters: "
        f"{seconds / 3600:.1f} h CPU, {seconds / cores / 3600:.1f} h on {cores} cores"
    )


def report(name: str, m: Measurement, parameters: int) -> None:
    rate = 4 * parameters / 1e9
    print(
        f"{name:17} {m.wall:7.1f} s wall ({rate / m.wall:.2f} GB/s)  {m.cpu:7.1f} s CPU ({rate / m.cpu:.2f} GB/s a "
        f"core)  {m.peak / 1e9:5.2f} GB peak"
    )


if __name__ == "__main__":
    main()
