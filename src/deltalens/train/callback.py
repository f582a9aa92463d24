"""Measures a model against its source weights while any HF or TRL trainer trains it.

At chosen steps the weights are rounded to bf16 and compared with the source by the analysis' own `measure`; the
leading directions of each update come from `train.geometry`. Training waits meanwhile and is not changed: no random
number is drawn from torch's, NumPy's or Python's global generators, and weights are only read.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from deltalens.analysis.settings import Settings
from deltalens.errors import ConfigError
from deltalens.train.geometry import moment_diagnostics, moment_sums
from deltalens.train.geometry_run import MOMENTS, GeometryRun, Row, begin_run, records
from deltalens.train.live_weights import LiveWeights, local_part

__all__ = ["UpdateGeometryCallback"]


class UpdateGeometryCallback(TrainerCallback):
    """Logs what training does to the weights, against the weights it started from. Definitions: docs/callback.md.

    Args:
        source: the source weights: a folder, a file or a Hub id; or "start", the model as training begins, of which
            a copy is kept in `geometry_source`, so that a resumed run has the same source.
        every: log after each step divisible by it.
        steps: log after these steps, instead of every `every`.
        output: folder of the files below; the trainer's `output_dir` if not given.
        threshold: τ; an update is visible where |bf16(W₊) − bf16(W)| > τ.
        at_start: also log before the first step, as step 0.

    Numbers go to `state.log_history` and to whatever `report_to` names, as `geometry/…`, and to
    `geometry.parquet`: columns `step`, `scope` (global, role, layer, module), `key`, then the metrics. The
    moments are those before the step's update, the gradient is the step's own.

    Raises:
        ConfigError: a value is out of range; as training begins: the model is sharded in a way that is not supported,
            or a resumed run lacks its snapshot.
        CheckpointError: as training begins: the source cannot be read, or is of another model.
    """

    def __init__(
        self,
        source: str | Path = "start",
        *,
        every: int = 10,
        steps: Sequence[int] | None = None,
        output: str | Path | None = None,
        threshold: float = 1e-5,
        at_start: bool = False,
    ) -> None:
        if every < 1 or any(step < 1 for step in steps or ()):
            raise ConfigError("UpdateGeometryCallback: steps are counted from 1")
        try:
            self.settings = Settings(threshold=threshold, compare_dtype="bf16", spectrum="none", ratios=())
        except ValueError as error:
            raise ConfigError(f"UpdateGeometryCallback: {error}") from None
        self.source, self.every, self.output, self.at_start = source, every, output, at_start
        self.steps = None if steps is None else frozenset(steps)
        self._run: GeometryRun | None = None
        self._moments: dict[str, float | None] = {}

    def due(self, step: int) -> bool:
        """Whether the geometry is logged after this step."""
        return step in self.steps if self.steps is not None else step % self.every == 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()
        weights = LiveWeights(kwargs["model"], main=state.is_world_process_zero)
        folder = Path(self.output or args.output_dir)
        self._run = begin_run(weights, folder, self.source, state.global_step, self.settings)
        self._moments = {}
        if self.at_start and state.global_step == 0:
            self._measure(args, state, control)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.due(state.global_step + 1):
            self._moments = _optimizer_diagnostics(kwargs["model"], kwargs["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.due(state.global_step):
            self._measure(args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()

    def _measure(self, args: Any, state: Any, control: Any) -> None:
        assert self._run is not None, "training has begun"
        start = time.perf_counter()
        rows = self._run.measure(state.global_step)
        moments, self._moments = self._moments, {}
        if rows is not None:
            table = records(rows, state.global_step, moments, self.settings)
            self._run.append(table)
            logs = {**_scalars(table), "geometry/seconds": round(time.perf_counter() - start, 3)}
            _report(args, state, control, logs)

    def _close(self) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None


def _optimizer_diagnostics(model: Any, optimizer: Any) -> dict[str, float | None]:
    """Of this step's gradient and the moments before it; an optimizer that keeps them otherwise says them itself."""
    import torch.distributed as dist

    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
        optimizer = optimizer.optimizer
    if hasattr(optimizer, "diagnostics"):
        told = optimizer.diagnostics()
        return {name: told.get(name) for name in MOMENTS}
    sums = moment_sums(model.parameters(), optimizer.state, local_part)
    if sums is None:
        return {}
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    return moment_diagnostics(sums.tolist())


def _scalars(table: list[Row]) -> dict[str, float]:
    """What is reported: the model's own record, and each role's share of the energy; undefined values are left out."""
    out = {name: value for name, value in table[0].items() if name not in ("step", "scope", "key")}
    for name in ("tensors", "parameters", "nonfinite_tensors", "energy_share"):
        out.pop(name)
    for record in table:
        if record["scope"] == "role":
            out[f"energy_share/{record['key']}"] = record["energy_share"]
    return {f"geometry/{name}": value for name, value in out.items() if value is not None}


def _report(args: Any, state: Any, control: Any, logs: dict[str, float]) -> None:
    """Log an entry of its own, as evaluation does: to the history, and to every callback that listens to `on_log`.

    Not by `Trainer.log`: TRL's trainers override it to add, and clear, averages that belong to their next own entry.
    """
    if state.epoch is not None:
        logs["epoch"] = state.epoch
    state.log_history.append({**logs, "step": state.global_step})
    handler = _dispatcher()
    if handler is not None:
        log_due = control.should_log  # `on_log` clears it; the trainer's own entry of this step is still to come
        handler.on_log(args, state, control, dict(logs))
        control.should_log = log_due


def _dispatcher() -> CallbackHandler | None:
    """The handler that is calling this callback. A trainer hands its callbacks no way back to its reporters."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, CallbackHandler):
            return owner
        frame = frame.f_back
    return None
