"""Memory of work under way, counted from its beginning until it ends: not until somebody comes to take what it gave."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class InFlight:
    """Bytes that may be taken at a time. One thread begins work and waits; work ends in any."""

    def __init__(self, budget: int) -> None:
        self._budget, self._bytes = budget, 0
        self._freed, self._ended = 0, threading.Condition()

    @property
    def room(self) -> int:
        """Below 0 where more was begun than fits."""
        with self._ended:
            self._settle()
            return self._budget - self._bytes

    def add(self, size: int) -> None:
        """Counts `size` bytes until as many are removed (then less than 0)."""
        with self._ended:
            self._bytes += size

    def watch(self, future: Future[Any], size: int) -> None:
        """Counts `size` bytes until this work ends."""
        self.add(size)
        future.add_done_callback(lambda _: self._end(size))

    def wait(self, awaited: Future[Any]) -> None:
        """Until this work has ended, or any other since `room` was looked at or somebody waited."""
        with self._ended:
            while not self._freed and not awaited.done():
                self._ended.wait()
            self._settle()

    def _settle(self) -> None:
        self._bytes, self._freed = self._bytes - self._freed, 0

    def _end(self, size: int) -> None:
        with self._ended:
            self._freed += size
            self._ended.notify()


def in_order(started: deque[tuple[Item, Future[Result]]], in_flight: InFlight, begin_more: Callable[[], None]) -> Iterator[tuple[Item, Result]]:
    """What was started and its results, in the order of the start. begin_more: starts, at the end of `started`, what there is room for."""
    begin_more()
    while started:
        item, future = started[0]
        while not future.done():
            in_flight.wait(future)
            begin_more()
        started.popleft()
        begin_more()
        yield item, future.result()
