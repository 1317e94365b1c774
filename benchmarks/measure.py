"""Running a command and watching it: wall time, peak anonymous memory, medians over repetitions."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Measured:
    """seconds: median wall time. peak_anonymous: largest RssAnon in bytes (mapped file pages are not counted)."""

    seconds: float
    peak_anonymous: int


# Looking for children reads the state of every process of the machine: done as often as memory is read, it takes a tenth of a core.
_CHILDREN_EVERY = 0.5


def anonymous_memory(process: psutil.Process, children: Sequence[psutil.Process] | None = None) -> int:
    """RssAnon of a process and its children, bytes (Linux). children: looked for when not given."""
    total = 0
    for one in [process, *(process.children(recursive=True) if children is None else children)]:
        try:
            lines = Path(f"/proc/{one.pid}/status").read_text().splitlines()
        except OSError:
            continue
        total += next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
    return total


def run_apart(script: str, *arguments: str) -> dict[str, Any]:
    """What `script` prints last, JSON, when it is called as this process was and with more arguments; exits with its error."""
    done = subprocess.run([sys.executable, script, *sys.argv[1:], *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


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
        children, next_look = handle.children(recursive=True), 0.0
        while process.poll() is None:
            if time.monotonic() >= next_look:
                children, next_look = handle.children(recursive=True), time.monotonic() + _CHILDREN_EVERY
            peak[0] = max(peak[0], anonymous_memory(handle, children))
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
