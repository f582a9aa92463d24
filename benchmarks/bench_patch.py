"""Patches against other ways to carry the same bits (sizes), and against `weightscope` (whole processes).

    python benchmarks/bench_patch.py SOURCE TRAINED [TRAINED ...]   one source, the ends of several runs
    python benchmarks/bench_patch.py                                synthetic pairs of 269 MB, 0.1 to 60 % changed

Sizes are in MB (10⁶ bytes). Times are medians of whole processes from a warm page cache, ours and the peer's taken in
turn; memory is the highest resident set. Every patch is applied, and the result compared with TRAINED byte by byte.

Columns of the size table:
    dense         TRAINED's tensors
    weightscope   `weightscope export` at its defaults (leaves out changes up to 1e-6, so it is not exact)
    XOR zstd      XOR with the source, byte planes, zstd level 3, a tensor at a time
    order 0       entropy of the differences of the words, one distribution for all tensors
    exp. zstd     the differences in the order of the source's exponents, byte planes, zstd level 1
    entropy       entropy of the differences given the source's exponent, a tensor at a time, models not counted
    patch         `deltalens pack`, everything included
"""

import argparse
import filecmp
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import zstandard
from processes import Measurement, command, machine, run_process
from safetensors.numpy import save_file

from deltalens.checkpoint import Checkpoint, open_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
DENSITIES = (0.001, 0.01, 0.1, 0.6)
HIDDEN, LAYERS, INNER, HEADS, VOCABULARY = 576, 30, 1536, 192, 49152  # SmolLM2-135M


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of SmolLM2-135M's 272 tensors."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        for name, shape in (
            ("self_attn.q_proj", (HIDDEN, HIDDEN)),
            ("self_attn.k_proj", (HEADS, HIDDEN)),
            ("self_attn.v_proj", (HEADS, HIDDEN)),
            ("self_attn.o_proj", (HIDDEN, HIDDEN)),
            ("mlp.gate_proj", (INNER, HIDDEN)),
            ("mlp.up_proj", (INNER, HIDDEN)),
            ("mlp.down_proj", (HIDDEN, INNER)),
            ("input_layernorm", (HIDDEN,)),
            ("post_attention_layernorm", (HIDDEN,)),
        ):
            out[f"{at}.{name}.weight"] = shape
    out["model.norm.weight"] = (HIDDEN,)
    return out


def synthetic(folder: Path) -> tuple[Path, list[Path]]:
    """Gaussian weights, and Gaussian updates of a scale that changes the wanted share of the rounded words."""
    rng = np.random.default_rng(0)
    source = {name: (rng.standard_normal(shape, np.float32) * 0.05).astype(BF16) for name, shape in shapes().items()}
    save(folder / "source", source)
    trained = []
    sample = source["model.embed_tokens.weight"][:2048].astype(np.float32)
    noise = rng.standard_normal(sample.shape, np.float32)
    for density in DENSITIES:
        low, high = 1e-9, 1.0
        for _ in range(40):
            scale = (low * high) ** 0.5
            changed = np.mean((sample + scale * noise).astype(BF16) != sample.astype(BF16))
            low, high = (scale, high) if changed < density else (low, scale)
        path = folder / f"synthetic {density:.1%}"
        moved = {
            name: (values.astype(np.float32) + np.float32(scale) * rng.standard_normal(values.shape, np.float32))
            for name, values in source.items()
        }
        save(path, {name: values.astype(BF16) for name, values in moved.items()})
        trained.append(path)
    return folder / "source", trained


def save(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')


@dataclass
class Sizes:
    """Bytes, and the share of the 16-bit words that changed."""

    dense: float = 0
    changed: float = 0
    planes: float = 0
    order0: float = 0
    ordered: float = 0
    conditioned: float = 0


def entropy_bytes(counts: np.ndarray) -> float:
    """Entropy of the last axis' counts, times their number, summed over the rows."""
    totals = counts.sum(axis=-1, dtype=np.float64)
    logs = np.sum(counts * np.log2(counts, out=np.zeros(counts.shape), where=counts > 0))
    return float(np.sum(totals * np.log2(totals, out=np.zeros(totals.shape), where=totals > 0)) - logs) / 8


def measure_sizes(source: Checkpoint, trained: Checkpoint) -> Sizes:
    """The alternatives' sizes over the tensors that both sides have as bf16; the others are counted as they are."""
    out = Sizes()
    differences = np.zeros(1 << 16, np.int64)
    words = 0
    for name, entry in trained.entries.items():
        out.dense += entry.nbytes
        base = source.entries.get(name)
        if base is None or (base.dtype, base.shape) != (entry.dtype, entry.shape) or entry.dtype != "BF16":
            for field in ("planes", "order0", "ordered", "conditioned"):
                setattr(out, field, getattr(out, field) + entry.nbytes)
            continue
        before, after = source.read(name).view(np.uint16), trained.read(name).view(np.uint16)
        words += before.size
        out.changed += np.count_nonzero(before != after)
        out.planes += packed(before ^ after, 3)
        step = after - before
        differences += np.bincount(step, minlength=1 << 16)
        exponent = ((before >> 7) & 0xFF).astype(np.uint8)
        order = np.argsort(exponent, kind="stable")
        signed = step.view(np.int16).astype(np.int32)
        zigzag = ((signed << 1) ^ (signed >> 15)).astype(np.uint16)
        out.ordered += packed(zigzag[order], 1)
        present, rank = np.unique(exponent, return_inverse=True)
        joint = np.bincount(rank.astype(np.int64) << 16 | step, minlength=present.size << 16)
        out.conditioned += entropy_bytes(joint.reshape(present.size, 1 << 16))
    out.order0 += entropy_bytes(differences)
    out.changed /= max(words, 1)
    return out


def packed(words: np.ndarray, level: int) -> int:
    planes = np.ascontiguousarray(words.view(np.uint8).reshape(-1, 2).T)
    return len(zstandard.ZstdCompressor(level=level).compress(planes.tobytes()))


def weight_files_equal(first: Path, second: Path) -> bool:
    names = [file.name for file in second.glob("*.safetensors")]
    return filecmp.cmpfiles(first, second, names, shallow=False)[0] == names


def show(label: str, runs: list[Measurement]) -> tuple[float, float]:
    wall, cpu = (statistics.median(getattr(run, field) for run in runs) for field in ("wall", "cpu"))
    peak = max(run.peak for run in runs)
    print(f"  {label:20} {wall:7.2f} s wall {cpu:7.2f} s CPU {peak / 1e9:6.2f} GB")
    return wall, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path)
    parser.add_argument("trained", nargs="*", type=Path)
    parser.add_argument("--runs", type=int, default=5, help="processes of each kind (default: 5)")
    arguments = parser.parse_args()
    if arguments.source and not arguments.trained:
        parser.error("SOURCE needs at least one TRAINED")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, ends = (arguments.source, arguments.trained) if arguments.trained else synthetic(folder)
        print(machine())
        patch, result = folder / "run.patch", folder / "result"
        peer_patch, peer_result = folder / "run.wsp", folder / "peer.safetensors"
        commands = {
            "deltalens pack": lambda end: command("deltalens", "pack", str(source), str(end), "-o", str(patch)),
            "weightscope export": lambda end: command(
                "weightscope", "export", str(source), str(end), "-o", str(peer_patch)
            ),
            "deltalens apply": lambda end: command("deltalens", "apply", str(source), str(patch), "-o", str(result)),
            "weightscope apply": lambda end: command(
                "weightscope", "apply", str(peer_patch), str(source), "-o", str(peer_result)
            ),
        }
        header = ("changed", "dense", "weightscope", "XOR zstd", "order 0", "exp. zstd", "entropy", "patch")
        rows = []
        for end in ends:
            runs: dict[str, list[Measurement]] = {label: [] for label in commands}
            for _ in range(arguments.runs):
                for label, make in commands.items():
                    for file in result.glob("*") if label == "deltalens apply" and result.exists() else ():
                        file.unlink()
                    if label == "weightscope apply":
                        peer_result.unlink(missing_ok=True)
                    runs[label].append(run_process(make(end)))
            assert weight_files_equal(result, end), f"{end}: the result is not TRAINED"
            print(end.name)
            figures = {label: show(label, measured) for label, measured in runs.items()}
            for ours, peer in (("pack", "export"), ("apply", "apply")):
                a, b = figures[f"deltalens {ours}"], figures[f"weightscope {peer}"]
                print(f"  {ours}: {b[0] / a[0]:.1f} × faster than weightscope {peer}, {a[1] / b[1]:.2f} × its memory")
            with open_checkpoint(source) as before, open_checkpoint(end) as after:
                sizes = measure_sizes(before, after)
            size = patch.stat().st_size
            values = [sizes.dense, peer_patch.stat().st_size, sizes.planes, sizes.order0, sizes.ordered]
            cells = [f"{value / 1e6:.2f}" for value in (*values, sizes.conditioned, size)]
            rows.append([end.name, f"{sizes.changed:.1%}", *cells, f"{size / sizes.conditioned:.3f}"])
        print("\n| pair | " + " | ".join(header) + " | patch / entropy |")
        print("|---|" + "---:|" * (len(header) + 1))
        for row in rows:
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
