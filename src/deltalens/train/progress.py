"""One progress display over the stages of a long command."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Stages"]

_LINE_EVERY = 60.0  # seconds


class Stages:
    """A bar for each stage on a terminal; elsewhere (logs, CI) a line a minute and one when a stage ends; nothing at
    all when quiet.

    >>> with Stages(quiet=True) as stages, stages.stage("training", total=2) as update:
    ...     update(1, "loss 0.3")
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stderr, quiet=quiet, highlight=False)
        self._bars = self._console.is_terminal and not quiet
        self._progress = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._bars,
        )

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self._console.print(line, markup=False)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int, str], None]]:
        """A stage of `total` units (None: of unknown length); gives a function to call with (units done, note)."""
        task = self._progress.add_task(name, total=total, note="")
        last, said = "", time.monotonic()

        def update(done: int, note: str) -> None:
            nonlocal last, said
            last = note
            self._progress.update(task, completed=done, note=note)
            if not self._bars and time.monotonic() > said + _LINE_EVERY:
                said = time.monotonic()
                self.say(f"{name}: {done}{f' of {total}' if total else ''}{f' ({note})' if note else ''}")

        yield update
        self._progress.update(task, total=total or 1, completed=total or 1, note=last)
        if not self._bars:
            self.say(f"{name}: done{f' ({last})' if last else ''}")
