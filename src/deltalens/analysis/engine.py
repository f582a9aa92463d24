"""Run `measure` over every pair: a few threads of one BLAS thread each, bounded memory, resumable.

Threads, not processes: NumPy's linear algebra, the numba kernels and pread all let go of the interpreter's lock, and
a second process would double the imports' memory. One tensor is worked on by one thread from start to end, so a
row does not depend on how many threads there were.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from threadpoolctl import threadpool_limits

from deltalens.analysis.cache import SourceCache
from deltalens.analysis.journal import Journal
from deltalens.analysis.memory import held_bytes, room_for
from deltalens.analysis.pair import Buffers, Measured, measure
from deltalens.analysis.settings import Settings
from deltalens.checkpoint.base import Checkpoint
from deltalens.checkpoint.pairing import TensorPair

__all__ = ["Gate", "Item", "Progress", "Rows", "default_jobs", "measure_all", "run_all"]

SURPLUS_BYTES = 8 << 20  # by which buffers may be larger than what is read into them

Progress = Callable[[int, int, str], None]
"""Called with checkpoint bytes done, bytes in all (both sides), and the name of the tensor just finished."""


class Item(Protocol):
    """What `run_all` works on: a `TensorPair`, or one tensor of several runs."""

    @property
    def name(self) -> str: ...

    @property
    def count(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Item)


def default_jobs() -> int:
    """One thread a processor that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _elements(item: Item) -> int:
    return item.count


@dataclass(frozen=True, slots=True)
class Gate:
    """How much those under way may weigh together (one alone may weigh more); in elements, unless said otherwise."""

    limit: int
    weigh: Callable[[Any], int] = _elements


class Rows:
    """What has been measured of `items`, by their places: into the journal as it comes, and told to `progress`."""

    def __init__(self, items: Sequence[Item], journal: Journal | None, progress: Progress | None) -> None:
        self._items, self._journal, self._progress = items, journal, progress
        finished = journal.finished() if journal is not None else {}
        self._found = {i: finished[item.name] for i, item in enumerate(items) if item.name in finished}
        self._total = sum(item.nbytes for item in items)
        self._done = sum(items[i].nbytes for i in self._found)
        self._tell("")

    def _tell(self, name: str) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total, name)

    def waiting(self) -> list[int]:
        """What is still to be measured, the largest first: nobody then idles while another finishes a large one."""
        return sorted((i for i in range(len(self._items)) if i not in self._found), key=lambda i: -self._items[i].count)

    def add(self, index: int, measured: Measured) -> None:
        self._found[index] = measured
        self._done += self._items[index].nbytes
        if self._journal is not None:
            self._journal.add(measured)
        self._tell(self._items[index].name)

    def in_order(self) -> list[Measured]:
        return [self._found[i] for i in range(len(self._items))]


class _Shelf:
    """Buffers that no thread has at the moment."""

    def __init__(self) -> None:
        self._free: list[Buffers] = []
        self._lock = threading.Lock()

    @contextmanager
    def lend(self, nbytes: int) -> Iterator[Buffers]:
        """Those that hold `nbytes` with the least to spare, else the largest.

        So two tensors that the gate lets in one after the other, such as an embedding and a head, share one set. Much
        larger ones are let go: tensors come largest first, and the gate does not see what lies on the shelf.
        """
        with self._lock:
            self._free = [free for free in self._free if free.nbytes <= nbytes + max(nbytes // 4, SURPLUS_BYTES)]
            self._free.sort(key=lambda buffers: (buffers.nbytes < nbytes, abs(buffers.nbytes - nbytes)))
            buffers = self._free.pop(0) if self._free else Buffers()
        try:
            yield buffers
        finally:
            with self._lock:
                self._free.append(buffers)


def measure_all(
    pairs: Sequence[TensorPair],
    source: Checkpoint,
    trained: Checkpoint,
    settings: Settings,
    *,
    master: Checkpoint | None = None,
    jobs: int | None = None,
    journal: Journal | None = None,
    cache: SourceCache | None = None,
    progress: Progress | None = None,
) -> list[Measured]:
    """Rows of all pairs, in the pairs' order.

    Args:
        pairs: from `pair_checkpoints`.
        source, trained, master: opened checkpoints; they must stay open.
        settings: what to compute.
        jobs: threads; one a processor by default, two for a device.
        journal: finished rows are written to it as they come, and taken from it where it has them already.
        cache: what was made of the source alone.
        progress: told after each tensor.

    Raises:
        CheckpointError: a tensor cannot be read.
        KeyboardInterrupt: passed on once the tensors under way have been written to the journal.
    """

    def work(pair: TensorPair, buffers: Buffers) -> Measured:
        return measure(pair, source, trained, settings, master, buffers, cache)

    return run_all(
        pairs,
        work,
        gate=Gate(room_for(pairs, settings), partial(held_bytes, settings=settings)),
        # Two threads keep a device busy: one reads and hashes while the other's tensor is on it.
        jobs=jobs or (default_jobs() if settings.device == "cpu" else 2),
        blas=settings.spectrum != "none",
        journal=journal,
        progress=progress,
    )


def run_all(
    items: Sequence[T],
    work: Callable[[T, Buffers], Measured],
    *,
    gate: Gate,
    jobs: int | None = None,
    blas: bool = True,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> list[Measured]:
    """`work` over every item, the largest first; results in the items' order.

    Args:
        items: with distinct names.
        work: one item and the calling thread's buffers in, its row out; called from several threads.
        gate: bounds what is worked on at once.
        blas: whether `work` uses BLAS, which then has one thread a call; to find its libraries takes 30 ms.
        jobs, journal, progress: as `measure_all` has them.

    Raises:
        CheckpointError: a tensor cannot be read.
        KeyboardInterrupt: passed on once the tensors under way have been written to the journal.
    """
    rows = Rows(items, journal, progress)
    waiting = rows.waiting()
    weights = [gate.weigh(item) for item in items]
    shelf = _Shelf()
    jobs = jobs or default_jobs()

    def one(item: T) -> Measured:
        with shelf.lend(item.nbytes) as buffers:
            return work(item, buffers)

    # A thread keeps some of the memory it has used: there are no more of them than were ever let in at once.
    with threadpool_limits(1) if blas else nullcontext(), ThreadPoolExecutor(jobs) as pool:
        running: dict[Future[Measured], int] = {}
        try:
            while waiting or running:
                inside = sum(weights[i] for i in running.values())
                # While one is too large, smaller ones go ahead of it.
                fitting = (i for i in waiting if not running or inside + weights[i] <= gate.limit)
                following = next(fitting, None) if len(running) < jobs else None
                if following is not None:
                    waiting.remove(following)
                    running[pool.submit(one, items[following])] = following
                    continue
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    rows.add(running.pop(future), future.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            if journal is not None:
                for future in running:
                    if future.done() and not future.cancelled() and future.exception() is None:
                        journal.add(future.result())
            raise
    return rows.in_order()
