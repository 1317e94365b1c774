"""Progress on a terminal; nothing in a pipe."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


class _ByteProgress:
    def __init__(self, bar: Progress | None, task: int) -> None:
        self._bar, self._task = bar, task
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        if self._bar is not None:
            with self._lock:
                self._bar.advance(self._task, count)  # type: ignore[arg-type]


@contextmanager
def byte_progress(total: int | None, what: str) -> Iterator[_ByteProgress]:
    """A bar with bytes, speed and remaining time on standard error, if that is a terminal. total: None if unknown."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _ByteProgress(None, 0)
        return
    # Not TextColumn(what): that would take braces and brackets of a name for a form to fill in.
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=False),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield _ByteProgress(bar, bar.add_task(what, total=total))
