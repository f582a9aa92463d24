"""Run a command and measure it: wall time, CPU time and peak resident memory, each over its whole process tree."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

INTERVAL = 0.01  # seconds between two looks at the memory


@dataclass(frozen=True)
class Measurement:
    """Seconds of wall time and of CPU time (user and system, children included), and the peak of summed RSS, bytes."""

    wall: float
    cpu: float
    peak: int


def environment() -> dict[str, str]:
    """This environment without OPENBLAS_* overrides, which would pin every tool to one kernel."""
    return {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}


def command(program: str, *arguments: str) -> list[str]:
    """The program of this interpreter's environment, or the one on the PATH.

    Raises:
        SystemExit: it is not installed.
    """
    beside = Path(sys.executable).parent / program
    found = str(beside) if beside.exists() else shutil.which(program)
    if found is None:
        raise SystemExit(f"{program} is not installed: pip install -e '.[bench]' (or `make bench`)")
    return [found, *arguments]


def machine() -> str:
    """One line: processors and linear algebra."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0]
    return f"{cores} cores, NumPy {np.__version__}, OPENBLAS_* overrides removed, load average {load:.1f}"


def run_process(arguments: list[str]) -> Measurement:
    """Run to the end and measure.

    Raises:
        SystemExit: the command failed; its last lines are shown.
    """
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(arguments, stdout=output, stderr=output, env=environment())
        peak = [0]
        watcher = threading.Thread(target=_watch, args=(process.pid, peak), daemon=True)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)  # counts the children that the process itself waited for
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        watcher.join()
        if process.returncode:
            output.seek(0)
            tail = output.read().decode(errors="replace")[-1500:]
            raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}:\n{tail}")
    # Not ru_maxrss: it starts from what this process held when it started the other.
    return Measurement(wall, usage.ru_utime + usage.ru_stime, peak[0])


def _watch(pid: int, peak: list[int]) -> None:
    try:
        root = psutil.Process(pid)
        while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
            total = 0
            for process in (root, *root.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue
            peak[0] = max(peak[0], total)
            time.sleep(INTERVAL)
    except psutil.Error:
        return
