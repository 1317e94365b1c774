"""A file written past the page cache where it lies on a disk of this machine, in pieces of any size and order.

What a job writes it does not read again. Through the page cache every 4 kB of it would take a fresh page: one that a source could have, and on
virtual machines, whose host has to find each page first, one that costs more time than the disk takes.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from pathlib import Path
from types import TracebackType

import numpy as np
import psutil

# Direct writes begin at a multiple of this and are as long as one, in the file as in memory: enough for the disks and file systems there are.
BLOCK = 4096
# Long enough for the full speed of a disk.
BUFFER_BYTES = 2**22
# Over a network the page cache lets many writes be on their way at a time, and memory is the page cache itself.
LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "overlay"}


class DirectFile:
    """A new file, or an old one emptied. No byte is written twice; some of what is written waits in memory for what is beside it, until `flush`.

    direct: False writes through the page cache, for what is read back at once. All methods raise OSError.
    """

    def __init__(self, path: Path, *, direct: bool = True) -> None:
        # Pages of its own begin at a multiple of a block. The last block is for one that came in parts.
        self._memory = memoryview(mmap.mmap(-1, BUFFER_BYTES + BLOCK))
        local = direct and file_system(path) in LOCAL_FILE_SYSTEMS
        # A mode as `open` gives it: read and write, less what the umask takes.
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        self._direct = local and _set_direct(self._descriptor, True)
        # A stretch of the file that is in memory; it begins there where it does in its block.
        self._begin = self._end = 0
        # Parts of blocks that are not complete yet, with the places where they begin.
        self._parts: dict[int, list[tuple[int, bytes]]] = {}

    def write(self, data: bytes | memoryview, begin: int) -> None:
        """Takes what begins at this place of the file; the memory of `data` may change afterwards."""
        source = np.frombuffer(data, dtype=np.uint8) if len(data) else np.empty(0, dtype=np.uint8)
        if begin != self._end:
            self._set_down()
            self._begin = self._end = begin
        while source.size:
            start = self._end - _block_of(self._begin)
            taken = source[: BUFFER_BYTES - start]
            # numpy lets other threads work meanwhile, which assigning to a memoryview does not.
            np.frombuffer(self._memory, dtype=np.uint8)[start : start + taken.size] = taken
            source, self._end = source[taken.size :], self._end + taken.size
            if self._end - _block_of(self._begin) == BUFFER_BYTES:
                self._set_down()

    def flush(self) -> None:
        """Hands all of it to the system."""
        self._set_down()
        self._through_the_page_cache()
        for parts in self._parts.values():
            for place, data in parts:
                self._put(memoryview(data), place)
        self._parts.clear()

    def sync(self) -> None:
        """Returns when what was flushed survives a power cut."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _set_down(self) -> None:
        """Writes the whole blocks of the stretch and keeps what is left of the first and the last one. The stretch is empty then."""
        first = _block_of(self._begin)
        head, tail = min(_block_of(self._begin + BLOCK - 1), self._end), max(_block_of(self._end), self._begin)
        if head > self._begin:
            self._keep(self._begin, bytes(self._memory[self._begin - first : head - first]))
        if tail > head:
            self._put(self._memory[head - first : tail - first], head)
        if self._end > max(head, tail):
            self._keep(max(head, tail), bytes(self._memory[max(head, tail) - first : self._end - first]))
        self._begin = self._end

    def _keep(self, place: int, data: bytes) -> None:
        block = _block_of(place)
        parts = self._parts.setdefault(block, [])
        parts.append((place, data))
        if sum(len(part) for _, part in parts) == BLOCK:
            self._memory[BUFFER_BYTES:] = b"".join(part for _, part in sorted(self._parts.pop(block)))
            self._put(self._memory[BUFFER_BYTES:], block)

    def _put(self, data: memoryview, place: int) -> None:
        while data:
            try:
                written = os.pwrite(self._descriptor, data, place)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._through_the_page_cache()
                continue
            data, place = data[written:], place + written

    def _through_the_page_cache(self) -> None:
        """From now on. Some file systems let a file be opened for direct writes and then take none; and none takes a part of a block."""
        if self._direct:
            _set_direct(self._descriptor, False)
            self._direct = False


def file_system(path: Path) -> str:
    """Name of the file system that a path is on, as the system calls it; "" where it does not say."""
    try:
        mounted = {Path(partition.mountpoint): str(partition.fstype) for partition in psutil.disk_partitions(all=True)}
    except OSError:  # no /proc
        return ""
    whole = path.resolve()
    return next((mounted[folder] for folder in (whole, *whole.parents) if folder in mounted), "")


def _set_direct(descriptor: int, direct: bool) -> bool:
    """Has writes go past the page cache, or through it again. Returns whether the system does so."""
    if sys.platform != "linux":
        return False
    import fcntl

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return True


def _block_of(place: int) -> int:
    """Where the block begins that this place of a file is in."""
    return place - place % BLOCK
