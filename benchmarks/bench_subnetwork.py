"""What training only a mask costs, beside dense AdamW (torch, fused) on the same weights: bytes held, time of the
optimizer, peak memory of whole training steps.

    python benchmarks/bench_subnetwork.py [MODEL_FOLDER] [--trained RUN_FOLDER] [--repeats 7]
        [--skip-peak | --skip-times]

Without a folder the model is SmolLM2-135M's shapes with random weights. Masks are uniformly random, the worst case for
memory access, unless --trained gives a run. Dense bf16 training
keeps bf16 gradients and a float32 master (14 bytes a parameter), float32 training 12. The time of the compact optimizer
includes gathering every gradient, gathering the weights and writing them back; that of dense bf16 training includes
widening the gradients and rounding the master.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from processes import machine
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from deltalens import CompactAdamW, SubnetworkMask
from deltalens.subnetwork import select_mask
from deltalens.subnetwork.kernels import gather, gatherer, scatter

DENSITIES = (0.175, 0.05, 0.01)
BYTES_ASKED = {0.175: 0.30, 0.01: 0.05}
TIME_ASKED = {0.175: 1.0, 0.05: 0.5, 0.01: 0.5}
DENSE_BYTES = {torch.float32: 12, torch.bfloat16: 14}
Times = np.ndarray  # (2,): seconds by the clock and of the processor
SETTINGS = {"lr": 1e-5, "weight_decay": 0.01}


def build(folder: str | None, dtype: torch.dtype) -> torch.nn.Module:
    if folder:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    config = LlamaConfig(**shape, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)
    return LlamaForCausalLM(config).to(dtype)


def make_mask(model: torch.nn.Module, density: float, folder: str | None, trained: str | None) -> SubnetworkMask:
    if folder and trained:
        return select_mask(folder, trained, rule=f"top:{density}")
    rng = np.random.default_rng(0)
    packed = {}
    for name, p in model.named_parameters():
        packed[name] = (tuple(p.shape), np.packbits(rng.random(p.numel(), np.float32) < density))
    return SubnetworkMask.from_packed(packed, rule=f"random:{density}", source_hash="0" * 64)


def dense_bytes(optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor], masters: list[torch.Tensor]) -> int:
    state = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in [*state, *gradients, *masters])


def compact_step(model: torch.nn.Module, optimizer: CompactAdamW, gradients: list[torch.Tensor]) -> Callable[[], Times]:
    """What backward's hooks and `step` do, on gradients that are there.

    A hook finds the gradient that backward has just written, so each is written anew before its hook, off the clock.
    """
    by_parameter = {id(tensor.parameter): tensor for tensor in optimizer.tensors}
    pairs = [(by_parameter[id(p)], p, g) for p, g in zip(model.parameters(), gradients, strict=True)]

    def step() -> Times:
        total = np.zeros(2)
        for tensor, parameter, gradient in pairs:
            parameter.grad = gradient.neg_()
            total += seconds(lambda: optimizer._collect(tensor, parameter))  # noqa: B023
        return total + seconds(optimizer.step)

    return step


def floor_step(model: torch.nn.Module, optimizer: CompactAdamW, gradients: list[torch.Tensor]) -> Callable[[], Times]:
    """The least that any optimizer of these positions does: fetch the gradients and write weights, no arithmetic."""
    by_parameter = {id(tensor.parameter): tensor for tensor in optimizer.tensors}
    found = [by_parameter[id(p)] for p in model.parameters()]
    values = [tensor.weights[tensor.positions()] for tensor in found]
    takers = [gatherer(tensor.index, tensor.grad, tensor.size) for tensor in found]

    def write() -> None:
        for tensor, value in zip(found, values, strict=True):
            scatter(tensor.weights, tensor.index, value)

    def step() -> Times:
        total = np.zeros(2)
        for take, gradient in zip(takers, gradients, strict=True):
            gradient.neg_()
            total += seconds(lambda: gather([take(gradient, False)]))  # noqa: B023
        return total + seconds(write)

    return step


def dense_step(
    weights: list[torch.Tensor], gradients: list[torch.Tensor]
) -> tuple[Callable[[], None], Callable[[], int]]:
    """A step of fused AdamW, by way of a float32 master for bf16 weights; and the bytes that it holds."""
    narrow = weights[0].dtype != torch.float32
    masters = [torch.nn.Parameter(w.detach().float() if narrow else w.detach()) for w in weights]
    optimizer = torch.optim.AdamW(masters, fused=True, **SETTINGS)
    if not narrow:
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient

    @torch.no_grad()
    def step() -> None:
        if narrow:
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient.float()
        optimizer.step()
        if narrow:
            torch._foreach_copy_(weights, masters)
            optimizer.zero_grad()

    return step, lambda: dense_bytes(optimizer, gradients, masters if narrow else [])


def seconds(call: Callable[[], None]) -> Times:
    """Of the clock, and of the processor over all threads: the latter holds on a machine that does other things too."""
    clock, processor = time.perf_counter(), time.process_time()
    call()
    return np.array([time.perf_counter() - clock, time.process_time() - processor])


def compare(folder: str | None, trained: str | None, dtype: torch.dtype, repeats: int) -> None:
    model = build(folder, dtype)
    weights = [p.detach() for p in model.parameters()]
    parameters = sum(w.numel() for w in weights)
    gradients = [torch.randn_like(w) * 1e-3 for w in weights]
    # Of its own weights: the compact optimizer would look at all of its own again, as someone else had written them.
    dense, dense_held = dense_step([w.clone() for w in weights], gradients)
    dense()
    base = dense_held()
    print(
        f"\n{dtype}: {parameters / 1e6:.1f} M parameters; dense AdamW holds {base / parameters:.2f} bytes a parameter"
    )
    assert abs(base / parameters - DENSE_BYTES[dtype]) < 0.1
    for density in DENSITIES:
        optimizer = CompactAdamW(model, make_mask(model, density, folder, trained), **SETTINGS)
        compact = compact_step(model, optimizer, gradients)
        compact()
        held = optimizer.held_bytes()
        floor = floor_step(model, optimizer, gradients)
        times = np.array([[seconds(dense), compact(), seconds(dense), floor()] for _ in range(repeats)])  # in turns
        (dense_wall, dense_cpu), (wall, cpu), _, (_, least) = times.min(axis=0) * 1e3
        parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in held.items())
        ratio, asked = sum(held.values()) / base, BYTES_ASKED.get(density)
        print(f"  {density:6.1%}  held {ratio:.4f} of dense{f' (asked {asked})' if asked else ''}: {parts} MB")
        print(f"          step {wall:.0f} ms against {dense_wall:.0f} ms: {wall / dense_wall:.2f} of dense")
        print(
            f"          processor time {cpu:.0f} ms against {dense_cpu:.0f} ms: {cpu / dense_cpu:.2f} of dense", end=""
        )
        print(f" (asked {TIME_ASKED[density]}); gathering and writing alone {least / dense_cpu:.2f}", flush=True)
        optimizer.detach()
        del optimizer, compact, floor
        gc.collect()


def peak_memory(*, since_now: bool = False) -> int:
    """Peak resident bytes of this process; Linux. `ru_maxrss` would start from what the parent process held."""
    if since_now:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def train_few(folder: str | None, dtype: torch.dtype, density: float) -> None:
    """Two training steps of 128 tokens in this process. Density 1 is dense AdamW.

    Prints the peak with weights and activations alone (a forward pass that keeps its graph), and that of the steps.
    """
    model = build(folder, dtype)
    tokens = torch.randint(0, 1000, (1, 128))
    gc.collect()
    peak_memory(since_now=True)
    loss = model(input_ids=tokens, labels=tokens).loss
    base = peak_memory()
    del loss
    masters: list[torch.nn.Parameter] = []
    if density == 1:
        masters = [torch.nn.Parameter(p.detach().float()) for p in model.parameters()] if dtype != torch.float32 else []
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(masters or model.parameters(), fused=True, **SETTINGS)
    else:
        mask = make_mask(model, density, None, None)  # held on to, as a trainer does
        optimizer = CompactAdamW(model, mask, **SETTINGS)
    peak_memory(since_now=True)
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        for parameter, master in zip(model.parameters(), masters, strict=False):
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for parameter, master in zip(model.parameters(), masters, strict=False):
                parameter.copy_(master)
    print(base, peak_memory())


def peaks(folder: str | None) -> None:
    print("\npeak resident memory of two training steps of 128 tokens, a process each")
    for dtype in ("float32", "bfloat16"):
        dense = (0, 0)
        for density in (1, 0.175, 0.01):
            call = [sys.executable, __file__, *([folder] if folder else []), "--train", dtype, str(density)]
            output = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True).stdout
            base, peak = map(int, output.split()[-2:])
            if density == 1:
                dense = (peak, peak - base)
            name = "dense" if density == 1 else f"{density:.1%}"
            print(
                f"  {dtype:8}  {name:6} {peak / 1e6:6.0f} MB ({peak / dense[0]:.2f} of dense); above weights, "
                f"activations and libraries {(peak - base) / 1e6:6.0f} MB ({(peak - base) / dense[1]:.2f} of dense)",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="a model's folder; random weights of SmolLM2-135M's shapes without")
    parser.add_argument(
        "--trained", metavar="FOLDER", help="masks of the largest of this run's changes, not random ones"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--skip-peak", action="store_true")
    parser.add_argument("--skip-times", action="store_true")
    parser.add_argument("--train", nargs=2, metavar=("DTYPE", "DENSITY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train_few(options.folder, getattr(torch, options.train[0]), float(options.train[1]))
        return
    print(machine(), f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("model:", Path(options.folder).name if options.folder else "random weights of SmolLM2-135M's shapes")
    for dtype in () if options.skip_times else (torch.float32, torch.bfloat16):
        compare(options.folder, options.trained, dtype, options.repeats)
        gc.collect()
    if not options.skip_peak:
        peaks(options.folder)


if __name__ == "__main__":
    main()
