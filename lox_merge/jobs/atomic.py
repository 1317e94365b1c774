"""Files that are either whole or not there: temporary name, fsync, rename."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lox_merge.errors import Interrupted, SourceError, WriteError

_CHUNK = 2**22


def json_bytes(value: Any) -> bytes:
    """Canonical JSON: the same value gives the same bytes. NaN and infinity are errors, not invalid JSON."""
    # Streamed: the manifest of 100,000 tensors is 115 MB, and `dumps` holds its million pieces as texts before it joins them (0.6 GB).
    data = io.BytesIO()
    with io.TextIOWrapper(data, encoding="utf-8", newline="\n") as text:
        json.dump(value, text, indent=2, ensure_ascii=False, allow_nan=False)
        text.write("\n")
        text.flush()
        return data.getvalue()


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes, scratch: Path) -> str:
    """Writes `data` to `path` through a temporary file in `scratch` (same file system). Returns its sha256."""
    return _put(path, [data], scratch)


def copy_atomically(source: Path, path: Path, scratch: Path) -> str:
    """The same with the contents of `source`, a piece at a time: it may be larger than memory. Raises SourceError where it cannot be read."""
    return _put(path, _pieces(source), scratch)


@contextmanager
def new_file(temporary: Path, final: Path | None = None) -> Iterator[IO[bytes]]:
    """A file to write, synced at the end, which gets its `final` name then; gone where that fails. Raises WriteError for every OSError."""
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if final:
            temporary.replace(final)
    except BaseException as error:
        with suppress(OSError):  # what is there of it may be all that fills the disk
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(final or temporary, error) from error
        raise


def _put(path: Path, pieces: Iterable[bytes], scratch: Path) -> str:
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error
    with new_file(scratch / (path.name + ".partial"), path) as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
    return digest.hexdigest()


def _pieces(source: Path) -> Iterator[bytes]:
    try:
        with source.open("rb", buffering=0) as file:
            while piece := file.read(_CHUNK):
                yield piece
    except OSError as error:
        raise SourceError(f"{source.name} cannot be read: {error.strerror or error}. Restore it and run the same command again.") from error


def write_error(path: Path, error: OSError) -> WriteError:
    return WriteError(
        f"{path.name} can't be written in {path.parent}: {error.strerror or error}. What was finished before is kept; "
        "make room or permissions and run the same command again to go on."
    )


def sha256_of(path: Path, stop: threading.Event | None = None) -> str:
    """sha256 of a file, read sequentially in pieces. Raises Interrupted once `stop` is set."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while piece := file.read(_CHUNK):
            digest.update(piece)
            if stop is not None and stop.is_set():
                raise Interrupted("stopped while reading")
    return digest.hexdigest()
