"""One training run's geometry: its source, a row a tensor at each logging, and the table that is kept on disk."""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from threadpoolctl import threadpool_limits

from deltalens.analysis.engine import default_jobs
from deltalens.analysis.memory import SMALL_ELEMENTS
from deltalens.analysis.pair import Buffers, measure
from deltalens.analysis.settings import Settings
from deltalens.analysis.summary import summarise_rows
from deltalens.checkpoint import Checkpoint, TensorPair, open_checkpoint, pair_checkpoints
from deltalens.checkpoint.formats.safetensors import SafetensorsSource
from deltalens.errors import ConfigError, DeltalensError
from deltalens.files import whole_file
from deltalens.metrics.overlap import subspace_similarity
from deltalens.metrics.values import prepare
from deltalens.train.geometry import DIRECTIONS, chance_columns, leading_columns, leading_directions
from deltalens.train.live_weights import LiveWeights
from deltalens.train.models import whole_folder

__all__ = ["MOMENTS", "GeometryRun", "Row", "begin_run", "records"]

TABLE, SNAPSHOT, SUBSPACES = "geometry.parquet", "geometry_source", "geometry_subspaces"
SIM = f"sim{DIRECTIONS}_first"
SPREAD = ("stable_rank", f"top{DIRECTIONS}_energy", SIM)  # mean and median over matrices
COVERAGE = "low_magnitude_coverage_10pct"
MOMENTS = ("momentum_gradient_cosine", "rms_variation")
SNAPSHOT_SHARD = 1 << 30  # bytes of the snapshot that are held at once
_log = logging.getLogger(__name__)
Row = dict[str, Any]


class GeometryRun:
    """What stays the same between loggings: source, pairing, first subspaces, the table so far."""

    def __init__(self, weights: LiveWeights, folder: Path, settings: Settings) -> None:
        self.weights, self.folder, self.settings = weights, folder, settings
        self.frozen: dict[str, list[Row]] = {}  # rows of what is not trained: measured once
        self.source: Checkpoint | None = None
        self.pairs: list[TensorPair] = []
        self.first: SafetensorsSource | None = None
        self.table = pl.DataFrame()

    def open(self, source: str | Path, step: int) -> None:
        """Open the source and take up what an earlier run up to `step` left (0: nothing). On the main process."""
        self.source = open_checkpoint(source)
        pairing = pair_checkpoints(self.source, self.weights.as_checkpoint())
        self.pairs = pairing.pairs
        left_out = [s for s in pairing.skipped if "tied" not in s.reason]
        if left_out:
            _log.warning("%d tensors are not measured: %s (%s), …", len(left_out), *_parts(left_out[0]))
        for file in sorted((self.folder / SUBSPACES).glob("step-*.safetensors")):
            if step == 0 or int(file.stem.removeprefix("step-")) > step:
                file.unlink()
        self._open_subspaces()
        table = self.folder / TABLE
        if step and table.is_file():
            self.table = pl.read_parquet(table).filter(pl.col("step") <= step)

    def _open_subspaces(self) -> None:
        files = sorted((self.folder / SUBSPACES).glob("step-*.safetensors"))
        if self.first is not None:
            self.first.close()
        self.first = SafetensorsSource(files) if files else None

    def measure(self, step: int) -> list[Row] | None:
        """A row a matrix or vector, in the source's order; None on the processes that only help to gather."""
        weights, by_live = self.weights, _by_live_name(self.pairs)
        done: dict[str, Row] = {}
        subspaces: dict[str, np.ndarray] = {}
        running: deque[tuple[str, list[Future[tuple[Row, np.ndarray | None]]]]] = deque()
        largest = max((entry.size for entry in weights.entries.values()), default=0)
        limit, inside = largest + max(largest // 4, SMALL_ELEMENTS), 0
        own = threading.local()

        def work(pair: TensorPair) -> tuple[Row, np.ndarray | None]:
            if not hasattr(own, "buffers"):
                own.buffers = Buffers()
            return self._row(pair, own.buffers)

        def finish() -> int:
            name, futures = running.popleft()
            rows = []
            for future in futures:
                row, right = future.result()
                rows.append(row)
                if right is not None:
                    subspaces[row["name"]] = right
            done.update((row["name"], row) for row in rows)
            if not weights.tensors[name].trainable:
                self.frozen[name] = rows
            weights.release(name)
            return weights.entries[name].size

        # torch's own threads are left alone: only the BLAS behind NumPy is held to one thread a worker.
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(default_jobs()) as pool:
            for name, live in weights.tensors.items():
                if not live.trainable and name in self.frozen:
                    done.update((row["name"], row) for row in self.frozen[name])
                    continue
                size = weights.entries[name].size
                while running and inside + size > limit:
                    inside -= finish()
                weights.hold(name)
                if not weights.main:
                    self.frozen[name] = []
                    continue
                running.append((name, [pool.submit(work, pair) for pair in by_live.get(name, ())]))
                inside += size
            while running:
                finish()
        if not weights.main:
            return None
        if subspaces:
            self._keep(subspaces, step)
        return [done[pair.name] for pair in self.pairs]

    def _row(self, pair: TensorPair, buffers: Buffers) -> tuple[Row, np.ndarray | None]:
        """The row of one tensor, and its leading right subspace where it is the first that could be resolved."""
        assert self.source is not None
        live = self.weights.as_checkpoint()
        row = measure(pair, self.source, live, self.settings, buffers=buffers).row
        if not pair.is_matrix or row["nonfinite_count"]:
            return row, None
        row |= chance_columns(pair.shape)
        energy = row["delta_energy"]
        if energy == 0:
            return row, None
        stored = self.source.read(
            pair.source_name, buffers.take("source", pair.nbytes), start=pair.source_start, count=pair.count
        )
        before = prepare(stored, pair.source_dtype, "bf16").reshape(pair.shape)
        after = live.read(pair.trained_name, start=pair.trained_start, count=pair.count).view(np.uint16)
        leading = leading_directions(before, after.reshape(pair.shape), energy)
        row |= leading_columns(leading, energy)
        if leading.right is None:
            return row, None
        if self.first is None or pair.name not in self.first.entries:
            return row | {SIM: 1.0}, leading.right
        shape = self.first.entries[pair.name].shape
        first = self.first.read(pair.name).view(np.float32).reshape(shape)
        return row | {SIM: subspace_similarity(first, leading.right)[0]}, None

    def _keep(self, subspaces: dict[str, np.ndarray], step: int) -> None:
        from safetensors.numpy import save_file

        with whole_file(self.folder / SUBSPACES / f"step-{step:08d}.safetensors") as temporary:
            save_file(subspaces, temporary)
        self._open_subspaces()

    def append(self, records: list[Row]) -> None:
        """Add a logging's records to the table, and write it whole."""
        new = pl.DataFrame(records, infer_schema_length=None)
        self.table = pl.concat([self.table, new], how="diagonal_relaxed") if self.table.height else new
        with whole_file(self.folder / TABLE) as temporary:
            self.table.write_parquet(temporary)

    def close(self) -> None:
        self.weights.close()
        for opened in (self.source.tensors if self.source else None, self.first):
            if opened is not None:
                opened.close()


def _parts(skipped: Any) -> tuple[str, str]:
    return skipped.tensor, skipped.reason


def _by_live_name(pairs: Sequence[TensorPair]) -> dict[str, list[TensorPair]]:
    out: dict[str, list[TensorPair]] = {}
    for pair in pairs:
        out.setdefault(pair.trained_name, []).append(pair)
    return out


def begin_run(weights: LiveWeights, folder: Path, source: str | Path, step: int, settings: Settings) -> GeometryRun:
    """A run's start, on all processes; an error of the main one is raised on all, so that none waits for it."""
    run = GeometryRun(weights, folder, settings)
    if source == "start":
        source = folder / SNAPSHOT
        if step == 0:
            _write_snapshot(weights, source)
    error: DeltalensError | None = None
    if weights.main:
        try:
            if step and source == folder / SNAPSHOT and not source.is_dir():
                raise ConfigError(
                    f"{source}: is not there, so that this run, resumed at step {step}, has no weights to compare "
                    'with; give UpdateGeometryCallback the source weights instead of "start"'
                )
            run.open(source, step)
        except DeltalensError as caught:
            error = caught
    if error := _shared(error):
        raise error
    return run


def _shared(error: DeltalensError | None) -> DeltalensError | None:
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return error
    message = [str(error) if error else None]
    dist.broadcast_object_list(message, src=0)
    return error or (DeltalensError(message[0]) if message[0] else None)


def _write_snapshot(weights: LiveWeights, folder: Path) -> None:
    """The model's weights as safetensors: bf16 where that is exact, else as they are. Gathers on all processes."""
    import torch
    from safetensors.torch import save_file

    shard: dict[str, Any] = {}
    held = count = 0
    with whole_folder(folder) if weights.main else nullcontext() as temporary:
        for name, live in weights.tensors.items():
            whole = live.gather(wanted=weights.main)
            if whole is None or temporary is None:
                continue
            words = whole.to(torch.bfloat16)
            exact = torch.equal(words.to(whole.dtype), whole)
            shard[name] = (words if exact else whole).cpu().clone(memory_format=torch.contiguous_format)
            held += shard[name].nbytes
            if held >= SNAPSHOT_SHARD:
                save_file(shard, temporary / f"part-{count:05d}.safetensors")
                shard, held, count = {}, 0, count + 1
        if temporary is not None:
            if shard:
                save_file(shard, temporary / f"part-{count:05d}.safetensors")
            (temporary / "config.json").write_text(json.dumps(weights.config, default=str))


def records(rows: list[Row], step: int, moments: dict[str, float | None], settings: Settings) -> list[Row]:
    """One record for the whole model and for each role, layer and module."""
    total = sum(row.get("delta_energy") or 0.0 for row in rows)
    out = []
    for scope, key, group in _scopes(rows):
        summary = summarise_rows(group, settings, whole=scope == "global")
        energy = sum(row.get("delta_energy") or 0.0 for row in group)
        record: Row = {"step": step, "scope": scope, "key": key}
        record |= {name: summary[name] for name in ("tensors", "parameters", "nonfinite_tensors", "visible_updates")}
        record |= {name: summary[name] for name in ("relative_norm", "sparsity", "unchanged_fraction")}
        record["energy_share"] = energy / total if total > 0 else None
        for name in SPREAD:
            values = [row[name] for row in group if row.get(name) is not None]
            chance = [row[f"{name}_random"] for row in group if f"{name}_random" in row]
            record[f"{name}_mean"] = float(np.mean(values)) if values else None
            record[f"{name}_median"] = float(np.median(values)) if values else None
            record[f"{name}_random"] = float(np.median(chance)) if chance else None
        for suffix in ("", "_core") if scope == "global" else ("",):
            pooled = summary[COVERAGE + suffix]
            record[COVERAGE + suffix] = pooled["pooled"]
            record |= {f"{COVERAGE}{suffix}_{name}": pooled[name] for name in ("random", "null", "excess")}
        if scope == "global":
            record |= {name: moments.get(name) for name in MOMENTS}
        out.append(record)
    return out


def _scopes(rows: list[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    yield "global", "", rows
    for scope in ("role", "layer", "module"):
        groups: dict[Any, list[Row]] = {}
        for row in rows:
            if row[scope] is not None:
                groups.setdefault(row[scope], []).append(row)
        for key in sorted(groups):
            yield scope, str(key), groups[key]
