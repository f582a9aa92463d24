"""Callbacks of every run: progress, the log on disk, bfloat16 snapshots, and a clean stop on Ctrl-C."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltalens.files import whole_file

__all__ = ["OnStep", "Stop", "interruptible", "log_rows", "watcher", "write_log"]

OnStep = Callable[[int, int, float], None]
"""Called after each step with the step, the number of steps and the loss."""


class Stop:
    """Set by the first Ctrl-C: the step under way is finished and saved. The second one stops at once."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def interruptible(stop: Stop) -> Iterator[None]:
    """Turns the first SIGINT into `stop.asked`; outside the main thread it changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(_signal: int, _frame: Any) -> None:
        stop.asked = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def watcher(
    *,
    log: Path,
    stop: Stop,
    on_step: OnStep | None = None,
    snapshot_every: int | None = None,
    snapshot: Callable[[int], None] | None = None,
) -> Any:
    """The `TrainerCallback` that does all this.

    Args:
        log: JSON lines, a line a step; written with each checkpoint and by `write_log` at the end.
        stop: asked to stop or not.
        on_step: progress.
        snapshot_every: steps between calls of `snapshot`, which gets the step.
        snapshot: saves the model as it is.
    """
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs is not None and "loss" in logs and on_step is not None:
                on_step(state.global_step, state.max_steps, float(logs["loss"]))

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                write_log(log, state.log_history)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if snapshot is not None and snapshot_every and state.global_step % snapshot_every == 0:
                snapshot(state.global_step)
            if stop.asked:
                control.should_save = True
                control.should_training_stop = True

    return Watcher()


def log_rows(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """One dict a step: `step`, `loss`, `grad_norm`, `learning_rate` and what the method logs, numbers only.

    Without `epoch`, which `max_steps` makes meaningless, and TRL's `num_tokens`, which a resumed run counts from 0.
    """
    return [
        {k: v for k, v in entry.items() if isinstance(v, (int, float)) and k not in ("epoch", "num_tokens")}
        for entry in history
        if "loss" in entry
    ]


def write_log(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """The rows of `log_rows` as JSON lines."""
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in log_rows(history)))
