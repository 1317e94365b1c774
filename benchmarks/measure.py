"""Running a command and watching it: wall time, peak anonymous memory, medians over repetitions."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Measured:
    """seconds: median wall time. peak_anonymous: largest RssAnon in bytes (mapped file pages are not counted)."""

    seconds: float
    peak_anonymous: int


def anonymous_memory(process: psutil.Process) -> int:
    """RssAnon of a process and its children, bytes (Linux)."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{one.pid}/status").read_text().splitlines()
        except OSError:
            continue
        total += next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
    return total


def run_command(command: Sequence[str], *, prepare: Callable[[], None] = lambda: None, repeat: int = 3, threads: int | None = None) -> Measured:
    """Median of `repeat` runs of a command after `prepare` each; raises CalledProcessError with its output."""
    seconds, peaks = [], []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    for _ in range(repeat):
        prepare()
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        peak = [0]
        watcher = threading.Thread(target=_watch, args=(process, peak), daemon=True)
        watcher.start()
        output, _ = process.communicate()
        seconds.append(time.perf_counter() - started)
        watcher.join()
        peaks.append(peak[0])
        if process.returncode:
            print(output, file=sys.stderr)
            raise subprocess.CalledProcessError(process.returncode, command)
    return Measured(statistics.median(seconds), max(peaks))


def _watch(process: subprocess.Popen[str], peak: list[int]) -> None:
    try:
        handle = psutil.Process(process.pid)
        while process.poll() is None:
            peak[0] = max(peak[0], anonymous_memory(handle))
            time.sleep(0.02)
    except psutil.NoSuchProcess:
        pass


def median_seconds(work: Callable[[], object], repeat: int = 5) -> float:
    """Median wall time of a call, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
