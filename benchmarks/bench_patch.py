"""Patches against other ways to carry the same bits (sizes), and against `weightscope` (whole processes).

    python benchmarks/bench_patch.py SOURCE TRAINED [TRAINED ...]   one source, the ends of several runs
    python benchmarks/bench_patch.py                                synthetic pairs, 0.1 to 60 % changed

The synthetic pairs have Gaussian weights and Gaussian updates of one scale, and the shapes of real models, since what
a tensor costs by itself (two hashes, a model) weighs more the smaller it is: `small` is SmolLM2-135M whole (272 tensors
of 0.5 M words on average, 61 of them norms), `large` five layers of Qwen2.5-1.5B without its embedding (60 tensors, 3.9
M words on average, up to 13.8 M).

Sizes are in MB (10⁶ bytes). Times are medians of whole processes from a warm page cache, ours and the peer's taken in
turn; memory is the highest resident set. Every patch is applied, and the result compared with TRAINED byte by byte.

Columns of the size table:
    dense         TRAINED's tensors
    weightscope   `weightscope export` at its defaults (leaves out changes up to 1e-6, so it is not exact)
    XOR zstd      XOR with the source, byte planes, zstd level 3, a tensor at a time
    order 0       entropy of the differences of the words, one distribution for all tensors
    exp. zstd     the differences in the order of the source's exponents, byte planes, zstd level 1
    entropy       entropy of the differences given the source's exponent, a tensor at a time, models not counted: it
                  fits every tensor's own counts, which a code would have to send or to learn
    one law       the same with one distribution for all tensors. Of a synthetic pair, whose tensors all follow one law,
                  it is what a code that is told the law needs: less is luck
    patch         `deltalens pack`, everything included
    hashes        what of it is hashes of tensors, 32 bytes each, which no coder makes smaller
"""

import argparse
import filecmp
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import zstandard
from processes import Measurement, command, machine, run_process
from safetensors.numpy import save_file

from deltalens.checkpoint import Checkpoint, open_checkpoint
from deltalens.patch import PatchFile, pack, verify

BF16 = np.dtype(ml_dtypes.bfloat16)
DENSITIES = (0.001, 0.01, 0.1, 0.6)
WEIGHT_SCALE = 0.05


def shapes(
    *, hidden: int, layers: int, inner: int, heads: int, vocabulary: int, biases: bool
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama-like model; `heads` is the width of keys and values."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)} if vocabulary else {}
    for i in range(layers):
        matrices = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (heads, hidden),
            "self_attn.v_proj": (heads, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        out |= {f"model.layers.{i}.{name}.weight": shape for name, shape in matrices.items()}
        if biases:
            out |= {
                f"model.layers.{i}.self_attn.{k}_proj.bias": (n,)
                for k, n in zip("qkv", (hidden, heads, heads), strict=True)
            }
        norms = ("input_layernorm", "post_attention_layernorm")
        out |= {f"model.layers.{i}.{name}.weight": (hidden,) for name in norms}
    if vocabulary:
        out["model.norm.weight"] = (hidden,)
    return out


SYNTHETIC = {
    "small": shapes(hidden=576, layers=30, inner=1536, heads=192, vocabulary=49152, biases=False),
    "large": shapes(hidden=1536, layers=5, inner=8960, heads=256, vocabulary=0, biases=True),
}


def synthetic(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Source and trained folders of each pair, there until the next one is asked for."""
    for label, tensors in SYNTHETIC.items():
        rng = np.random.default_rng(0)
        draw = lambda shape: rng.standard_normal(shape, np.float32)  # noqa: E731, B023
        source = {name: (draw(shape) * WEIGHT_SCALE).astype(BF16) for name, shape in tensors.items()}
        save(folder / "source", source)
        for density in DENSITIES:
            scale = scale_of(density)
            trained = {n: (w.astype(np.float32) + scale * draw(w.shape)).astype(BF16) for n, w in source.items()}
            path = folder / f"{label} {density:.1%}"
            save(path, trained)
            del trained
            yield folder / "source", path
            shutil.rmtree(path)
        shutil.rmtree(folder / "source")


def scale_of(density: float) -> np.float32:
    """Standard deviation of a Gaussian update that changes this share of the rounded words."""
    rng = np.random.default_rng(1)
    sample = (rng.standard_normal(1 << 20, np.float32) * WEIGHT_SCALE).astype(BF16).astype(np.float32)
    noise = rng.standard_normal(sample.shape, np.float32)
    low, high = 1e-9, 1.0
    for _ in range(40):
        scale = (low * high) ** 0.5
        changed = np.mean((sample + np.float32(scale) * noise).astype(BF16) != sample.astype(BF16))
        low, high = (scale, high) if changed < density else (low, scale)
    return np.float32(scale)


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
    one_law: float = 0
    pooled: dict[int, np.ndarray] = field(default_factory=dict)  # exponent → counts of the differences


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
            for column in ("planes", "order0", "ordered", "conditioned", "one_law"):
                setattr(out, column, getattr(out, column) + entry.nbytes)
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
        joint = joint.reshape(present.size, 1 << 16)
        out.conditioned += entropy_bytes(joint)
        for value, counts in zip(present.tolist(), joint, strict=True):
            out.pooled[value] = out.pooled.get(value, 0) + counts
    out.order0 += entropy_bytes(differences)
    out.one_law += sum(entropy_bytes(counts) for counts in out.pooled.values())
    out.changed /= max(words, 1)
    return out


def packed(words: np.ndarray, level: int) -> int:
    planes = np.ascontiguousarray(words.view(np.uint8).reshape(-1, 2).T)
    return len(zstandard.ZstdCompressor(level=level).compress(planes.tobytes()))


def hash_bytes(path: Path) -> int:
    """Bytes of the tensors' hashes in a patch."""
    with PatchFile(path) as patch:
        entries = patch.tensors.values()
        return 32 * sum((entry.source_hash is not None) + (entry.codec != "unchanged") for entry in entries)


def weight_files_equal(first: Path, second: Path) -> bool:
    names = [file.name for file in second.glob("*.safetensors")]
    return filecmp.cmpfiles(first, second, names, shallow=False)[0] == names


def show(label: str, runs: list[Measurement]) -> tuple[float, float]:
    wall, cpu = (statistics.median(getattr(run, field) for run in runs) for field in ("wall", "cpu"))
    peak = max(run.peak for run in runs)
    print(f"  {label:20} {wall:7.2f} s wall {cpu:7.2f} s CPU {peak / 1e9:6.2f} GB")
    return wall, peak


@dataclass
class Places:
    """Where the commands write."""

    patch: Path
    result: Path
    peer_patch: Path
    peer_result: Path


def time_pair(source: Path, end: Path, at: Places, runs: int) -> None:
    """Run every command in turn, `runs` times; print the medians, and compare the result."""
    a, b, patch, peer = (str(path) for path in (source, end, at.patch, at.peer_patch))
    commands = {
        "deltalens pack": command("deltalens", "pack", a, b, "-o", patch),
        "weightscope export": command("weightscope", "export", a, b, "-o", peer),
        "deltalens apply": command("deltalens", "apply", a, patch, "-o", str(at.result)),
        "weightscope apply": command("weightscope", "apply", peer, a, "-o", str(at.peer_result)),
    }
    measured: dict[str, list[Measurement]] = {label: [] for label in commands}
    for _ in range(runs):
        shutil.rmtree(at.result, ignore_errors=True)
        at.peer_result.unlink(missing_ok=True)
        for label, arguments in commands.items():
            measured[label].append(run_process(arguments))
    assert weight_files_equal(at.result, end), f"{end}: the result is not TRAINED"
    figures = {label: show(label, of_label) for label, of_label in measured.items()}
    for ours, peer in (("pack", "export"), ("apply", "apply")):
        mine, theirs = figures[f"deltalens {ours}"], figures[f"weightscope {peer}"]
        speed, memory = theirs[0] / mine[0], mine[1] / theirs[1]
        print(f"  {ours}: {speed:.1f} × faster than weightscope {peer}, {memory:.2f} × its memory")


COLUMNS = (
    *("pair", "changed", "dense", "weightscope", "XOR zstd", "order 0", "exp. zstd", "entropy", "one law", "patch"),
    *("hashes", "patch / entropy", "patch / one law", "without hashes / one law"),
)


def size_row(source: Path, end: Path, at: Places) -> list[str]:
    with open_checkpoint(source) as before, open_checkpoint(end) as after:
        sizes = measure_sizes(before, after)
    size, hashes = at.patch.stat().st_size, hash_bytes(at.patch)
    peer = f"{at.peer_patch.stat().st_size / 1e6:.3f}" if at.peer_patch.exists() else "–"
    values = (sizes.planes, sizes.order0, sizes.ordered, sizes.conditioned, sizes.one_law, size)
    ratios = (size / sizes.conditioned, size / sizes.one_law, (size - hashes) / sizes.one_law)
    row = [end.name, f"{sizes.changed:.1%}", f"{sizes.dense / 1e6:.2f}", peer]
    return [*row, *(f"{v / 1e6:.3f}" for v in values), f"{hashes / size:.1%}", *(f"{r:.3f}" for r in ratios)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path)
    parser.add_argument("trained", nargs="*", type=Path)
    parser.add_argument(
        "--runs", type=int, default=5, help="processes of each kind (default: 5); 0: sizes of ours only"
    )
    arguments = parser.parse_args()
    if arguments.source and not arguments.trained:
        parser.error("SOURCE needs at least one TRAINED")
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = ((arguments.source, end) for end in arguments.trained)
        at = Places(folder / "run.patch", folder / "result", folder / "run.wsp", folder / "peer.safetensors")
        rows = []
        for source, end in given if arguments.trained else synthetic(folder):
            print(end.name, flush=True)
            if arguments.runs:
                time_pair(source, end, at, arguments.runs)
            else:
                result_hash = pack(source, end, at.patch).result_hash
                assert verify(source, [at.patch]).result_hash == result_hash
            rows.append(size_row(source, end, at))
        print("\n| " + " | ".join(COLUMNS) + " |")
        print("|---|" + "---:|" * (len(COLUMNS) - 1))
        for row in rows:
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
