"""Cost of `UpdateGeometryCallback` against the training that it watches, in one run.

    python benchmarks/bench_callback.py [--source DIR] [--trained DIR] [--steps 20] [--every 10] [--batch 32]

Trains SmolLM2-135M-Instruct (or the model in --source; from the weights in --trained, if given, so that the updates are
those of a real run) on random tokens by the plain HF trainer: float32 weights, bfloat16 autocast, AdamW, 58 tokens an
example. Prints the time of a logging (of the first, which also compiles and allocates, and of the rest), that of the
optimizer's diagnostics, the share of the training time that both cost, and how far the resident set rises in a logging
above what training itself holds. Beside each wall time stands the processor time, which other programs' load hardly
moves; the share is given of both.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from processes import machine
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from deltalens import UpdateGeometryCallback
from deltalens.train.models import quiet_libraries

TOKENS = 58  # 46 of a prompt and 12 of a reply, as in the runs of docs/results
RATE = 2e-5


@dataclass(frozen=True)
class Seconds:
    """Wall and processor time."""

    wall: float
    cpu: float

    @staticmethod
    def now() -> "Seconds":
        return Seconds(time.perf_counter(), time.process_time())

    def __sub__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)

    @staticmethod
    def median(of: "list[Seconds]") -> "Seconds":
        return Seconds(statistics.median(s.wall for s in of), statistics.median(s.cpu for s in of))

    @staticmethod
    def total(of: "list[Seconds]") -> "Seconds":
        return Seconds(sum(s.wall for s in of), sum(s.cpu for s in of))

    def __str__(self) -> str:
        return f"{self.wall:8.2f} s, processor {self.cpu:7.2f} s"


class Timed(UpdateGeometryCallback):
    """Times its own hooks, and watches the resident set in them."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seconds: dict[str, list[Seconds]] = {"begin": [], "moments": [], "logging": []}
        self.rises: list[int] = []

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        process, stop = psutil.Process(), threading.Event()
        before = peak = process.memory_info().rss

        def watch() -> None:
            nonlocal peak
            while not stop.wait(0.005):
                peak = max(peak, process.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = Seconds.now()
        yield
        self.seconds[name].append(Seconds.now() - start)
        stop.set()
        watcher.join()
        self.rises.append(peak - before)

    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        with self.clock("begin"):
            super().on_train_begin(*arguments, **options)

    def on_pre_optimizer_step(self, args: Any, state: Any, *arguments: Any, **options: Any) -> None:
        if self.due(state.global_step + 1):
            with self.clock("moments"):
                super().on_pre_optimizer_step(args, state, *arguments, **options)

    def on_step_end(self, args: Any, state: Any, *arguments: Any, **options: Any) -> None:
        if self.due(state.global_step):
            with self.clock("logging"):
                super().on_step_end(args, state, *arguments, **options)


class Steps(TrainerCallback):
    """Time of each step, from its first forward pass to the end of its optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[Seconds] = []
        self.peak = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = Seconds.now()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.seconds.append(Seconds.now() - self.start)
        self.peak = max(self.peak, psutil.Process().memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path)
    parser.add_argument("--trained", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        source = options.source
        if source is None:
            from deltalens.train.embedded import embedded_model

            source = embedded_model()
        model = AutoModelForCausalLM.from_pretrained(options.trained or source, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, model.config.vocab_size, (options.batch * options.steps, TOKENS), generator=generator)
        callback, steps = Timed(source, every=options.every), Steps()
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=options.batch,
                max_steps=options.steps,
                learning_rate=RATE,
                bf16=True,
                use_cpu=not torch.cuda.is_available(),
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
            callbacks=[steps, callback],
        )
        begin = Seconds.now()
        trainer.train()
        whole = Seconds.now() - begin
        # What each hook took is inside `whole`; the diagnostics' part lies inside a step.
        logs = [entry for entry in trainer.state.log_history if "geometry/sparsity" in entry]
    print(machine())
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{millions:.0f}M parameters, sparsity {logs[-1]['geometry/sparsity']:.3f}")
    first, *rest = callback.seconds["logging"]
    print(f"a training step      {Seconds.median(steps.seconds)} (median of {len(steps.seconds)})")
    print(f"as training begins   {callback.seconds['begin'][0]} (once)")
    print(f"first logging        {first}")
    if rest:
        print(f"a later logging      {Seconds.median(rest)} (median of {len(rest)})")
    print(f"optimizer's moments  {Seconds.median(callback.seconds['moments'])}")
    spent = Seconds.total(callback.seconds["moments"] + callback.seconds["logging"])
    training = whole - spent - callback.seconds["begin"][0]
    print(
        f"cost every {options.every} steps  {spent.wall / training.wall:8.2%} of the training time without it, "
        f"processor {spent.cpu / training.cpu:.2%} (under 5 % is asked)"
    )
    rise = max(callback.rises) / 2**20
    print(f"resident set         {rise:8.0f} MiB more in a logging, {steps.peak / 2**20:.0f} MiB in training")


if __name__ == "__main__":
    main()
