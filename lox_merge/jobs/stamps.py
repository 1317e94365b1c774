"""Stamps of source files, taken and compared."""

from __future__ import annotations

from pathlib import Path

from lox_merge.checkpoint.stamps import Stamp, stamp_of
from lox_merge.errors import SourceChangedError

SourceFile = tuple[str, str]  # (role, file name)


def stamp(file: SourceFile, path: Path) -> Stamp:
    """What shows that a source was written to. Raises SourceChangedError where it is gone."""
    try:
        return stamp_of(path)
    except OSError as error:
        raise SourceChangedError(f"{file[0]}: {file[1]} is no longer there ({error.strerror}). Restore it and run the same command again.") from error


def check_stamp(file: SourceFile, path: Path, before: Stamp) -> None:
    """Raises SourceChangedError when a file changed since it had the stamp `before`."""
    if stamp(file, path) != before:
        raise SourceChangedError(
            f"{file[0]}: {file[1]} changed while it was being read. Nothing of this shard was kept; "
            "leave the sources alone and start again with --overwrite."
        )
