"""What shows that a file was written to."""

from __future__ import annotations

from pathlib import Path

Stamp = tuple[int, int, int, int]  # size, time of the last change and of the last change of any kind (nanoseconds), number on the disk


def stamp_of(path: Path) -> Stamp:
    """The stamp of a file. Raises OSError where it is gone."""
    status = path.stat()
    # Size and time of change can be put back by whoever writes a file; the time of its last change of any kind and its number cannot.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
