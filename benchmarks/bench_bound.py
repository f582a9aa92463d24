"""Peak memory of spectra on pairs of few shapes, against the bound of issue 11 and against PyPI's `modeldelta`.

    python benchmarks/bench_bound.py

The bound is 500 MB and 4 × the largest tensor in float32, over the whole process tree. Pairs are synthetic; each is
analysed with as many threads as there are processors and with 16. `modeldelta` takes the spectrum of Δ alone; its bound
is nobody's claim, its peak stands beside ours.
"""

import sys
import tempfile
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
from processes import command, machine, run_process
from safetensors.numpy import save_file

from deltalens.analysis.engine import default_jobs

PAIRS: dict[str, tuple[int, tuple[int, int], type]] = {
    "one 4096 × 4096": (1, (4096, 4096), ml_dtypes.bfloat16),
    "four 8960 × 1536": (4, (8960, 1536), ml_dtypes.bfloat16),
    "four 1536 × 8960": (4, (1536, 8960), ml_dtypes.bfloat16),
    "six 1536 × 1536": (6, (1536, 1536), ml_dtypes.bfloat16),
    "forty 576 × 576": (40, (576, 576), ml_dtypes.bfloat16),
    "one 49152 × 576": (1, (49152, 576), ml_dtypes.bfloat16),
    "four 8960 × 1536 F32": (4, (8960, 1536), np.float32),
}


def write_pair(folder: Path, count: int, shape: tuple[int, int], dtype: type) -> list[str]:
    rng = np.random.default_rng(0)
    sides: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = {}, {}
    for i in range(count):
        name = f"model.layers.{i}.mlp.up_proj.weight"
        source = (np.float32(0.02) * rng.standard_normal(shape, np.float32)).astype(dtype)
        update = np.float32(1.5e-5) * rng.standard_normal(shape, np.float32)
        sides[0][name], sides[1][name] = source, (source.astype(np.float32) + update).astype(dtype)
    paths = folder / "source", folder / "trained"
    for path, tensors in zip(paths, sides, strict=True):
        path.mkdir(parents=True)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return [str(path) for path in paths]


def main() -> None:
    if len(sys.argv) > 1:
        raise SystemExit(__doc__)
    threads, over = (default_jobs(), 16), 0
    print(machine())
    print(f"{'peak, MB':22} {'bound':>6}", *(f"{f'{m}, {n} threads':>18}" for m in ("exact", "fast") for n in threads),
          f"{'modeldelta':>11}", " exact ÷ modeldelta")  # fmt: skip
    for label, (count, shape, dtype) in PAIRS.items():
        bound = 500e6 + 16 * prod(shape)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            pair = write_pair(folder, count, shape, dtype)
            peaks = []
            for mode in ("exact", "fast"):
                for jobs in threads:
                    out = str(folder / f"{mode}-{jobs}")
                    options = ["--spectrum", mode, "--jobs", str(jobs), "--quiet", "-o", out]
                    peaks.append(run_process(command("deltalens", "analyze", *pair, *options)).peak)
            peer = run_process(command("modeldelta", *pair, "-q", "-o", str(folder / "modeldelta.json"))).peak
        over += sum(peak > bound for peak in peaks)
        print(f"{label:22} {bound / 1e6:6.0f}", *(f"{peak / 1e6:18.0f}" for peak in peaks), f"{peer / 1e6:11.0f}",
              f"{peaks[0] / peer:19.2f} ×", flush=True)  # fmt: skip
    if over:
        sys.exit(f"{over} over the bound")


if __name__ == "__main__":
    main()
