"""`trajectory` against the parts that it is made of, taken alone, in CPU seconds of one thread.

    python benchmarks/bench_trajectory.py [SOURCE CKPT CKPT...] [--include GLOB] [--draws 3] [--runs 1]

Without checkpoints it makes a run of five at the shapes of two layers of SmolLM2-135M (bf16). The parts, for k
checkpoints: k times reading both sides and the coordinate pass with its nulls (`analyze --spectrum none`), k times
all singular values of Δ, k factorisations of the trained weights and one of the source (every singular value, the
leading 20 % of the vectors). The trajectory does that, and besides projections, rotations, principal masks, the
top-16 subspaces and packed masks. The null draws are counted apart. Beside it, k times `analyze` of the same tensors.
All alternate tensor by tensor; of several runs each part of each tensor counts with its least time, as other work on
a machine only ever adds.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from processes import machine
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits

from deltalens import Settings
from deltalens.analysis.follow import follow
from deltalens.analysis.pair import Buffers, measure
from deltalens.analysis.runs import RunSet, RunTensor, open_runs
from deltalens.metrics.blocks import delta_blocks, value_blocks
from deltalens.metrics.spectrum import factorise, singular_values
from deltalens.metrics.values import prepare

HIDDEN, FFN, KEYS_VALUES, CHECKPOINTS = 576, 1536, 192, 5


def synthetic_run(folder: Path) -> list[Path]:
    """SOURCE and five checkpoints whose updates add up; at the end about a quarter of the coordinates differ."""
    shapes = {}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (KEYS_VALUES, HIDDEN) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, FFN)
    rng = np.random.default_rng(0)
    source = {name: (0.05 * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    total = {name: np.zeros(shape) for name, shape in shapes.items()}
    paths = [folder / "source", *(folder / f"checkpoint-{10 * i}" for i in range(1, CHECKPOINTS + 1))]
    for path in paths:
        tensors = {name: (w.astype(np.float64) + total[name]).astype(w.dtype) for name, w in source.items()}
        path.mkdir()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        for update in total.values():
            update += 3e-5 / CHECKPOINTS**0.5 * rng.standard_normal(update.shape)
    return paths


def parts_alone(run: RunSet, tensor: RunTensor, settings: Settings, buffers: Buffers) -> dict[str, float]:
    """CPU seconds of each part for one tensor."""
    spent = dict.fromkeys(("coordinates", "spectra", "trained", "source"), 0.0)
    plain = replace(settings, spectrum="none")
    first = tensor.first
    for i, (pair, checkpoint) in enumerate(zip(tensor.pairs, run.runs, strict=True)):
        start = time.thread_time()
        measure(pair, run.source, checkpoint, plain, buffers=buffers)
        spent["coordinates"] += time.thread_time() - start
        if not pair.is_matrix:
            continue
        raw = run.source.read(pair.source_name, start=pair.source_start, count=pair.count)
        before = prepare(raw, pair.source_dtype, settings.compare).reshape(first.shape)
        raw = checkpoint.read(pair.trained_name, start=pair.trained_start, count=pair.count)
        after = prepare(raw, pair.trained_dtype, settings.compare).reshape(first.shape)
        length, width = max(first.shape), min(first.shape)
        vectors = max(1, int(max(settings.ratios) * width))
        start = time.thread_time()
        singular_values(partial(delta_blocks, before, after), length, width)
        spent["spectra"] += time.thread_time() - start
        for name, side in (("trained", after), ("source", before)):
            if name == "trained" or i == 0:
                start = time.thread_time()
                factorise(partial(value_blocks, side), length, width, vectors)
                spent[name] += time.thread_time() - start
    return spent


def whole(run: RunSet, tensor: RunTensor, settings: Settings, buffers: Buffers) -> float:
    start = time.thread_time()
    follow(tensor, run.source, run.runs, settings, buffers)
    return time.thread_time() - start


def one_tensor(
    run: RunSet, tensor: RunTensor, settings: Settings, drawing: Settings, buffers: Buffers
) -> dict[str, float]:
    """CPU seconds of the parts, of as many analyses, and of the whole without and with its draws."""
    spent = parts_alone(run, tensor, settings, buffers)
    start = time.thread_time()
    for pair, checkpoint in zip(tensor.pairs, run.runs, strict=True):
        measure(pair, run.source, checkpoint, settings, buffers=buffers)
    spent["analyses"] = time.thread_time() - start
    spent["whole"] = whole(run, tensor, settings, buffers)
    if drawing.null_draws:
        spent["drawing"] = whole(run, tensor, drawing, buffers)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", type=Path, metavar="SOURCE CKPT CKPT...")
    parser.add_argument("--include", action="append", default=[])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--runs", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, threadpool_limits(1):
        source, *checkpoints = arguments.run or synthetic_run(Path(temporary))
        settings = Settings(compare_dtype="bf16")
        drawing = replace(settings, null_draws=arguments.draws)
        with open_runs(source, checkpoints, include=arguments.include) as run:
            buffers = Buffers()
            smallest = min(run.tensors, key=lambda tensor: (not tensor.first.is_matrix, tensor.count))
            whole(run, smallest, drawing, buffers)  # compiles
            parts_alone(run, smallest, settings, buffers)
            parts = dict.fromkeys(("coordinates", "spectra", "trained", "source"), 0.0)
            total = drawn = analyses = 0.0
            for tensor in run.tensors:
                seen = [one_tensor(run, tensor, settings, drawing, buffers) for _ in range(arguments.runs)]
                least = {name: min(spent[name] for spent in seen) for name in seen[0]}
                for name in parts:
                    parts[name] += least[name]
                total += least["whole"]
                analyses += least["analyses"]
                drawn += least["drawing"] - least["whole"] if arguments.draws else 0.0
            size = sum(tensor.count for tensor in run.tensors)
            print(f"{machine()}; {len(run.tensors)} tensors, {size:,} parameters, {len(run.runs)} checkpoints")
    alone = sum(parts.values())
    for name, label in (
        ("coordinates", "k reads and coordinate passes"),
        ("spectra", "k spectra of Δ"),
        ("trained", "k factorisations of W₊"),
        ("source", "one factorisation of W"),
    ):
        print(f"{label:32} {parts[name]:8.2f} s")
    print(f"{'parts alone':32} {alone:8.2f} s")
    print(f"{'trajectory':32} {total:8.2f} s   {total / alone:.2f} × the parts")
    print(f"{'k times analyze':32} {analyses:8.2f} s   trajectory is {total / analyses:.2f} of it")
    print(f"{f'its {arguments.draws} null draws, apart':32} {drawn:8.2f} s")


if __name__ == "__main__":
    main()
