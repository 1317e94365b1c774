"""What shows that a source file was written to."""

from __future__ import annotations

from pathlib import Path

from lox_merge.errors import SourceChangedError

SourceFile = tuple[str, str]  # (role, file name)
Stamp = tuple[int, int, int, int]  # size, time of the last change and of the last change of any kind (nanoseconds), number on the disk


def stamp(file: SourceFile, path: Path) -> Stamp:
    """What shows that a source was written to. Raises SourceChangedError where it is gone."""
    try:
        return stamp_of(path)
    except OSError as error:
        raise SourceChangedError(f"{file[0]}: {file[1]} is no longer there ({error.strerror}). Restore it and run the same command again.") from error


def stamp_of(path: Path) -> Stamp:
    """The stamp of a file. Raises OSError where it is gone."""
    status = path.stat()
    # Size and time of change can be put back by whoever writes a file; the time of its last change of any kind and its number cannot.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def check_stamp(file: SourceFile, path: Path, before: Stamp) -> None:
    """Raises SourceChangedError when a file changed since it had the stamp `before`."""
    if stamp(file, path) != before:
        raise SourceChangedError(
            f"{file[0]}: {file[1]} changed while it was being read. Nothing of this shard was kept; "
            "leave the sources alone and start again with --overwrite."
        )
