"""One optimizer step of on-policy distillation: OPDTrainer beside TRL's DistillationTrainer and beside a plain loop.

    python benchmarks/bench_opd.py STUDENT TEACHER [--steps 4] [--threads 2]

STUDENT and TEACHER are local model folders of one family; without them the text model that comes with deltalens is
both. All three take the same prompts, the same number of rollouts and new tokens, float32 weights under bfloat16
autocast and a bfloat16 teacher. The plain loop is what one writes by hand: `generate`, two forward passes of the whole
model, the reverse KL of the full logits, `backward`, AdamW. Rounds are interleaved, so that a machine that is busy
slows all of them; CPU seconds are printed beside wall-clock seconds for the same reason (`--threads 1` makes them the
work itself, without waiting). All three together take 8 GB.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltalens.train.models import load_model, load_tokenizer, quiet_libraries
from deltalens.train.tasks import Sums

PROMPTS, NEW_TOKENS, RATE = 32, 12, 2e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", nargs="?", type=Path)
    parser.add_argument("teacher", nargs="?", type=Path)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each, after one that warms up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="of trl, loop, ours, ours:topk_forward_kl, …")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    with quiet_libraries(), tempfile.TemporaryDirectory() as folder:
        student = options.student or _embedded()
        teacher = options.teacher or student
        names = options.only or ["trl", "loop", "ours"]
        runs = {name: _run(name, student, teacher, Path(folder)) for name in names}
        wall: dict[str, list[float]] = {name: [] for name in names}
        cpu: dict[str, list[float]] = {name: [] for name in names}
        for step in range(options.steps + 1):
            for name, run in runs.items():
                start, used = time.perf_counter(), time.process_time()
                run()
                if step:
                    wall[name].append(time.perf_counter() - start)
                    cpu[name].append(time.process_time() - used)
                    print(f"{name} {wall[name][-1]:.2f} s, CPU {cpu[name][-1]:.2f} s", file=sys.stderr)
    print(f"{'':24}{'s a step':>10}{'CPU s':>10}{'to loop':>10}{'to TRL':>10}")
    for name in names:
        row = [statistics.median(wall[name]), statistics.median(cpu[name])]
        ratios = [
            row[0] / statistics.median(wall[other]) if other in wall else float("nan") for other in ("loop", "trl")
        ]
        print(f"{name:24}{row[0]:10.2f}{row[1]:10.2f}{ratios[0]:10.2f}{ratios[1]:10.2f}")


def _embedded() -> Path:
    from deltalens.train.embedded import embedded_model

    return embedded_model()


def _prompts() -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": e.prompt}]} for e in Sums().train(PROMPTS)]


def _run(name: str, student: Path, teacher: Path, folder: Path) -> Callable[[], None]:
    """A function that takes one step, with everything loaded."""
    model, tokenizer = load_model(student, "float32"), load_tokenizer(student)
    # TRL's tutorials load the teacher as the config says; SmolLM2's says bfloat16.
    master = load_model(teacher, "bfloat16")
    if name == "loop":
        return _loop(model, master, tokenizer)
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    from deltalens.train.opd import OPDConfig, OPDTrainer

    settings: dict[str, Any] = {
        "output_dir": str(folder / name.replace(":", "-")),
        "max_steps": 1000,
        "per_device_train_batch_size": PROMPTS,
        "max_completion_length": NEW_TOKENS,
        "learning_rate": RATE,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    data = Dataset.from_list(_prompts())
    if name == "trl":
        trainer: Any = DistillationTrainer(
            model, master, DistillationConfig(**settings), data, processing_class=tokenizer
        )
    else:
        loss = name.partition(":")[2] or "reverse_kl"
        trainer = OPDTrainer(model, master, OPDConfig(**settings, loss=loss), data, processing_class=tokenizer)
    return _stepwise(trainer)


def _stepwise(trainer: Any) -> Callable[[], None]:
    """The trainer's own loop, in a thread that goes on for one step at a call."""
    import threading

    from transformers import PrinterCallback, TrainerCallback

    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class Pause(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            done.release()
            go.acquire()

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Pause())
    threading.Thread(target=trainer.train, daemon=True).start()
    done.acquire()

    def step() -> None:
        go.release()
        done.acquire()

    return step


def _loop(model: Any, teacher: Any, tokenizer: Any) -> Callable[[], None]:
    import torch

    teacher.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    texts = [tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True, tokenize=False) for r in _prompts()]

    def step() -> None:
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        width = batch["input_ids"].shape[1]
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            ids = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=True, top_k=0)
        model.train()
        reply = ids[:, width:]
        ended = (reply == tokenizer.eos_token_id).cumsum(1)
        keep = (ended - (reply == tokenizer.eos_token_id).long()) == 0
        mask = torch.cat([batch["attention_mask"], keep.long()], 1)
        inputs = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": reply.shape[1] + 1, "use_cache": False}
        with torch.no_grad():
            # The head's input is a slice; on a weight without gradient matmul copies the weight for each row of it.
            hidden = teacher.model(input_ids=ids, attention_mask=mask).last_hidden_state
            target = teacher.lm_head(hidden[:, -reply.shape[1] - 1 : -1].contiguous())[keep].float().log_softmax(-1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**inputs).logits[:, :-1][keep]
        own = logits.float().log_softmax(-1)
        loss = (own.exp() * (own - target)).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
