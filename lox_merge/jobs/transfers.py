"""Copies between mapped files and a device through a few pinned buffers: while one is on the bus, the next is filled or emptied.

Buffers are of one size, whatever the matrices': a matrix passes in pieces of whole rows. On the CPU the same code runs with a thread
in the place of the bus, so that its order and its waiting are tested where there is no GPU.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from lox_merge.errors import LoxMergeWarning

# Two keep bus and memory busy at once; a third rides out a slow page of a file.
BUFFERS = 3
# Large enough that a copy takes a thousand times as long as starting it (1 ms at 50 GB/s).
BUFFER_BYTES = 64 * 2**20


class Mark(Protocol):
    """A point in the order of a device's work."""

    def wait(self) -> None:
        """Until the device has come there."""
        ...

    def order(self) -> None:
        """What this thread has the device do from now on comes after it; the thread itself goes on."""
        ...


class Lane(Protocol):
    """Copies one after another, beside everything else."""

    def copy(self, source: Tensor, target: Tensor) -> Mark: ...

    def follow(self, mark: Mark) -> None:
        """What is copied from now on comes after `mark`."""
        ...

    def close(self) -> None: ...


class _Done:
    """The CPU has done what it was told when the call returns."""

    def wait(self) -> None:
        return

    def order(self) -> None:
        return


class _Copied:
    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()

    order = wait


class HostLane:
    """A thread that copies."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="copy")

    def copy(self, source: Tensor, target: Tensor) -> Mark:
        return _Copied(self._pool.submit(target.copy_, source))

    def follow(self, mark: Mark) -> None:
        mark.wait()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class CudaMark:
    """An event, recorded in the current stream of this thread, or in `stream`."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        # Threads that wait for a copy sleep: spinning would take the core from those that fill buffers.
        self._device, self._event = device, torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._event.record(stream or torch.cuda.current_stream(device))

    def wait(self) -> None:
        self._event.synchronize()

    def order(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def hold(self, stream: torch.cuda.Stream) -> None:
        stream.wait_event(self._event)


class CudaLane:
    """A stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, source: Tensor, target: Tensor) -> Mark:
        # The memory of a fresh tensor may still be in use by what this thread's stream was told before.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return CudaMark(self._device, self._stream)

    def follow(self, mark: Mark) -> None:
        assert isinstance(mark, CudaMark)
        mark.hold(self._stream)

    def close(self) -> None:
        self._stream.synchronize()


def lane_of(device: torch.device) -> Lane:
    return CudaLane(device) if device.type == "cuda" else HostLane()


def mark_here(device: torch.device) -> Mark:
    """After all that this thread has had the device do."""
    return CudaMark(device) if device.type == "cuda" else _Done()


class Transfers:
    """One direction between host and device; one thread uses it at a time."""

    def __init__(self, device: torch.device, *, buffers: int = BUFFERS, size: int = BUFFER_BYTES, lane: Lane | None = None) -> None:
        self.device, self._size = device, size
        self._lane = lane or lane_of(device)
        # Oldest first. A buffer is free when its mark was waited for.
        self._ring: deque[tuple[Tensor, Mark]] = deque((self._buffer(size), _Done()) for _ in range(buffers))

    def upload(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Mark:
        """Copies host matrices into matrices of the device, (rows, columns) each. Returns when the last one has left its place on the
        host; the mark says when all of them have arrived. Raises what reading a source raises; then nothing is on its way any more."""
        last: Mark = _Done()
        try:
            for source, target in pairs:
                for rows in self._pieces(source):
                    staged = self._staged(source[rows])
                    staged.copy_(source[rows])
                    last = self._lane.copy(staged, target[rows])
                    self._hold(last)
        except BaseException:
            self._settle()
            raise
        return last

    def download(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Mark) -> None:
        """Copies matrices of the device into host matrices once the device has come to `after`. Returns when they are there."""
        self._lane.follow(after)
        arriving: deque[tuple[Mark, Tensor, Tensor]] = deque()
        try:
            for source, target in pairs:
                for rows in self._pieces(source):
                    if len(arriving) == len(self._ring):
                        _put(*arriving.popleft())
                    staged = self._staged(source[rows])
                    mark = self._lane.copy(source[rows], staged)
                    self._hold(mark)
                    arriving.append((mark, staged, target[rows]))
            while arriving:
                _put(*arriving.popleft())
        except BaseException:
            self._settle()
            raise

    def close(self) -> None:
        self._lane.close()
        self._ring.clear()

    def _staged(self, piece: Tensor) -> Tensor:
        """The oldest buffer as a matrix like `piece`, once what it held has arrived; it is the youngest now."""
        buffer, mark = self._ring[0]
        mark.wait()
        count = piece.numel() * piece.element_size()
        if buffer.numel() < count:  # a single row larger than a buffer
            buffer = self._buffer(count)
        self._ring[0] = buffer, _Done()
        self._ring.rotate(-1)
        return buffer[:count].view(piece.dtype).view(piece.shape)

    def _hold(self, mark: Mark) -> None:
        """The youngest buffer is in use until then."""
        self._ring[-1] = self._ring[-1][0], mark

    def _pieces(self, matrix: Tensor) -> Iterator[slice]:
        rows, columns = matrix.shape
        step = max(1, self._size // max(1, columns * matrix.element_size()))
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def _settle(self) -> None:
        """Waits until nothing is on its way, whatever became of it."""
        for place, (buffer, mark) in enumerate(self._ring):
            with contextlib.suppress(Exception):  # it is raised where the copy was asked for
                mark.wait()
            self._ring[place] = buffer, _Done()

    def _buffer(self, size: int) -> Tensor:
        if self.device.type != "cuda":
            return torch.empty(size, dtype=torch.uint8)
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            warnings.warn(
                f"{size >> 20} MiB of memory could not be pinned for copies to {self.device} ({str(error).splitlines()[0]}); they go the slow way",
                LoxMergeWarning,
                stacklevel=2,
            )
            return torch.empty(size, dtype=torch.uint8)


def _put(mark: Mark, staged: Tensor, target: Tensor) -> None:
    mark.wait()
    target.copy_(staged)
