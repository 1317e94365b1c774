"""Streams of a GPU for work that is recorded, each with what was recorded on it.

A stream that is being recorded must be nobody else's meanwhile. torch hands out thirty-two of each priority in turn, and so the same ones
again and again; these few are taken once, from the high priority, which nothing else here asks for, and lent to one thread at a time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch

# As many as a pipeline edits at a time, and one more.
LANES = 4
# What lanes keep, of the device's memory.
SHARE = 0.02


@runtime_checkable
class Sized(Protocol):
    @property
    def bytes(self) -> int:
        """On the device."""
        ...


Kept = TypeVar("Kept", bound=Sized)


class Lane(Generic[Kept]):
    """A stream, and what was made on it, the one used last at the end."""

    def __init__(self, stream: torch.cuda.Stream | None, room: int) -> None:
        self.stream, self._room = stream, room
        self.kept: OrderedDict[Hashable, Kept] = OrderedDict()

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.kept.values())

    def keep(self, key: Hashable, item: Kept) -> None:
        """The oldest are let go when there is no room for all; the last one stays."""
        self.kept[key] = item
        while len(self.kept) > 1 and self.bytes > self._room:
            self.kept.popitem(last=False)


class Lanes(Generic[Kept]):
    """Lanes that threads take in turn."""

    def __init__(self, lanes: list[Lane[Kept]]) -> None:
        self._free, self._returned = lanes, threading.Condition()

    @contextmanager
    def lend(self, key: Hashable) -> Iterator[Lane[Kept]]:
        """A lane that has this key if one is free, else the one that keeps least. Waits for one."""
        with self._returned:
            while not self._free:
                self._returned.wait()
            lane = min(self._free, key=lambda lane: (key not in lane.kept, lane.bytes))
            self._free.remove(lane)
        try:
            yield lane
        finally:
            with self._returned:
                self._free.append(lane)
                self._returned.notify()

    def forget(self) -> None:
        """Lets go of what free lanes keep."""
        with self._returned:
            for lane in self._free:
                lane.kept.clear()


@contextmanager
def borrowed(lanes: Lanes[Kept], key: Hashable, make: Callable[[], Kept]) -> Iterator[Kept]:
    """What a lane keeps under this key, or what `make` makes there. What is done with it goes to the lane's stream, after what this thread's
    stream was told before, and before what it is told next. After an error it is not used again."""
    with lanes.lend(key) as lane:
        item = lane.kept.pop(key, None)
        with _on(lane.stream):
            item = item or make()
            yield item
        lane.keep(key, item)


@contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work for this stream, in its place in the order of what this thread's stream is told. None: where there are no streams."""
    if stream is None:
        yield
        return
    here = torch.cuda.current_stream(stream.device)
    stream.wait_stream(here)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        here.wait_stream(stream)


def lanes_of(device: torch.device) -> Lanes[Kept]:
    """New lanes on a GPU."""
    room = int(torch.cuda.get_device_properties(device).total_memory * SHARE) // LANES
    return Lanes([Lane(torch.cuda.Stream(device, priority=-1), room) for _ in range(LANES)])  # type: ignore[no-untyped-call]
