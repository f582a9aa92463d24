"""`measure` over every pair on a Ray cluster: one task a tensor, on whatever node has room for it.

The rows are those of the local engine, to the byte. Checked with Ray 2.60.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from deltalens.analysis.cache import SourceCache
from deltalens.analysis.engine import Progress, Rows
from deltalens.analysis.journal import Journal
from deltalens.analysis.memory import held_bytes
from deltalens.analysis.pair import Measured, measure
from deltalens.analysis.settings import Settings
from deltalens.checkpoint import Checkpoint, open_checkpoint
from deltalens.checkpoint.pairing import TensorPair
from deltalens.errors import CheckpointError, DeltalensError

__all__ = ["Inputs", "measure_all_on_ray"]

WORKER_BYTES = 300 << 20  # of a worker that holds no tensor
ATTEMPTS_MORE = 2  # after a worker or its node was lost


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a worker on any node opens; two of the same are opened once a process.

    Attributes:
        source, trained, master: absolute paths, or Hub ids.
        files: name and bytes of every file of each, as the command found them.
        cache: folder of what was made of the source alone, which all nodes see.
        settings: what to compute.
    """

    source: str
    trained: str
    master: str | None
    files: tuple[tuple[tuple[str, int], ...], ...]
    cache: str | None
    settings: Settings

    @classmethod
    def of(
        cls,
        source: Checkpoint,
        trained: Checkpoint,
        master: Checkpoint | None,
        cache: SourceCache | None,
        settings: Settings,
    ) -> Inputs:
        sides = [side for side in (source, trained, master) if side is not None]
        return cls(
            _anywhere(source.path),
            _anywhere(trained.path),
            _anywhere(master.path) if master is not None else None,
            tuple(map(_sizes, sides)),
            str(cache.folder.absolute()) if cache is not None else None,
            settings,
        )


def _anywhere(spec: str) -> str:
    path = Path(spec).expanduser()
    return str(path.absolute()) if path.exists() else spec


def _sizes(checkpoint: Checkpoint) -> tuple[tuple[str, int], ...]:
    return tuple((file.name, file.stat().st_size) for file in checkpoint.files)


def measure_all_on_ray(
    pairs: Sequence[TensorPair],
    inputs: Inputs,
    *,
    jobs: int | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> list[Measured]:
    """Rows of all pairs, in the pairs' order.

    The cluster is the one that this process is connected to, else the one that RAY_ADDRESS names. None is started: one
    machine needs no Ray, and Ray listens on every interface of it.

    Args:
        pairs: from `pair_checkpoints`.
        inputs: of the same checkpoints.
        jobs: tensors at a time; by default two a processor of the cluster are handed out, of which Ray runs those that
            it has a processor and memory for.
        journal, progress: as the local engine has them.

    Raises:
        CheckpointError: a tensor cannot be read, or a node finds other files than this process did.
        DeltalensError: Ray is not installed, there is no cluster, or it lost a worker for good.
    """
    rows = Rows(pairs, journal, progress)
    waiting = rows.waiting()[::-1]
    with _cluster() as ray:
        task = ray.remote(num_cpus=1, max_retries=ATTEMPTS_MORE)(_measure)
        largest_node = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
        room = jobs or 2 * int(ray.cluster_resources().get("CPU", 1))
        inputs_there = ray.put(inputs)
        running: dict[Any, int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < room:
                    index = waiting.pop()
                    wanted = min(WORKER_BYTES + held_bytes(pairs[index], inputs.settings), largest_node)
                    # Two tensors keep a device busy: one is read and hashed while the other is on it.
                    share = 0.5 if inputs.settings.device != "cpu" else 0
                    options = task.options(memory=wanted, num_gpus=share, name=pairs[index].name)
                    running[options.remote(inputs_there, pairs[index])] = index
                for done in ray.wait(list(running))[0]:
                    index = running.pop(done)
                    rows.add(index, _result(ray, done, pairs[index].name))
        finally:
            for left in running:
                ray.cancel(left, force=True)
    return rows.in_order()


def _result(ray: Any, done: Any, name: str) -> Measured:
    try:
        measured: Measured = ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DeltalensError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise DeltalensError(
            f"Ray lost the workers that measured tensor {name!r} ({type(error).__name__}: {str(error).splitlines()[0]})"
            "; with -o, finished tensors are kept and the same command goes on"
        ) from None
    return measured


@contextmanager
def _cluster() -> Iterator[Any]:
    try:
        import ray
    except ImportError:
        raise DeltalensError("--engine ray needs Ray: pip install 'deltalens[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise DeltalensError(
            "--engine ray wants a cluster: set RAY_ADDRESS to its HOST:PORT, or to auto for the one that runs on this "
            "machine (one machine alone is faster with --engine local)"
        )
    try:
        _reach(address)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, OSError) as error:
        raise DeltalensError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); where it asks for a "
            "token, RAY_AUTH_MODE=token sends yours"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Ray itself would try for two minutes, and then end the process."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "//" not in host:
        socket.create_connection((host, int(port)), timeout=5).close()


def _measure(inputs: Inputs, pair: TensorPair) -> Measured:
    """In a worker. One BLAS thread, as in the local engine: a row then does not depend on where it was made."""
    source, trained, master = _open(inputs)
    cache = SourceCache(Path(inputs.cache)) if inputs.cache is not None else None
    with threadpool_limits(1):
        return measure(pair, source, trained, inputs.settings, master, cache=cache)


@lru_cache(maxsize=1)
def _open(inputs: Inputs) -> tuple[Checkpoint, Checkpoint, Checkpoint | None]:
    if inputs.settings.device != "cpu":
        from deltalens.accelerator import check_device

        check_device(inputs.settings.device)
    try:
        source = open_checkpoint(inputs.source)
        trained = open_checkpoint(inputs.trained, base=source)
        master = open_checkpoint(inputs.master) if inputs.master is not None else None
        sides = [side for side in (source, trained, master) if side is not None]
        for side, expected in zip(sides, inputs.files, strict=True):
            if _sizes(side) != expected:
                raise CheckpointError(f"{side.path}: has other files than where the command was given")
    except (CheckpointError, OSError) as error:
        raise CheckpointError(
            f"{error} (Ray node {socket.gethostname()}); all nodes must see the same checkpoints under the same paths, "
            "or give Hub ids"
        ) from None
    return source, trained, master
