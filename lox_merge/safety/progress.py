"""Progress of replies and the like, as a protocol and as a bar on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class CountProgress(Protocol):
    """Told how many more items are done."""

    def advance(self, count: int) -> None: ...


# Given the number of items and what they are, opens a display of them for the time of a `with` statement.
ProgressFactory = Callable[[int, str], AbstractContextManager[CountProgress]]


class _Silent:
    def advance(self, count: int) -> None:
        pass


@contextmanager
def no_progress(total: int, what: str) -> Iterator[CountProgress]:
    """Shows nothing."""
    yield _Silent()


@contextmanager
def terminal_progress(total: int, what: str) -> Iterator[CountProgress]:
    """A bar with count and remaining time on standard error, if that is a terminal; else nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal or not total:
        yield _Silent()
        return
    # Not TextColumn(what): that would take braces and brackets of a name for a form to fill in.
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)

        class Shown:
            def advance(self, count: int) -> None:
                bar.advance(task, count)

        yield Shown()
