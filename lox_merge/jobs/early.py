"""Source files hashed while the program still imports torch: other cores have nothing to do then.

Nothing is believed that would not be otherwise: a hash counts only for the stamp that its file had before it was read, and whoever takes
the hash compares stamps again when the shard is written.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import zip_longest
from pathlib import Path

from lox_merge.checkpoint.files import LocalFolder
from lox_merge.checkpoint.stamps import Stamp, stamp_of
from lox_merge.errors import SourceError
from lox_merge.jobs.atomic import sha256_of

_SUFFIX = ".safetensors"


class _Early:
    """Hashes files one after another until somebody asks for the first of them: from then on whoever plans the work knows better."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handed_over = False
        self._begun: dict[Path, tuple[Stamp, Future[str]]] = {}

    def hash_all(self, files: Sequence[Path]) -> None:
        for path in files:
            future: Future[str] = Future()
            with self._lock:
                if self._handed_over:
                    return
                try:
                    self._begun[path] = stamp_of(path), future
                except OSError:
                    return  # the plan says what is wrong with it
            try:
                future.set_result(sha256_of(path))
            except BaseException as error:  # whoever waits for the hash would wait for ever
                future.set_exception(error)
                return

    def take(self, path: Path, stamp: Stamp) -> Future[str] | None:
        with self._lock:
            self._handed_over = True
            before, future = self._begun.pop(path, (None, None))
        return future if before == stamp else None


_EARLY = _Early()


def begin_early(folders: Sequence[str | Path]) -> None:
    """Begins to hash the weights of local checkpoints, in the order in which shards will need them, in a thread that ends with the process."""
    found = [_weights(Path(folder)) for folder in folders if Path(folder).is_dir()]
    files = list(dict.fromkeys(path for row in zip_longest(*found) for path in row if path is not None))
    if files:
        threading.Thread(target=_EARLY.hash_all, args=(files,), name="hash early", daemon=True).start()


def _weights(folder: Path) -> list[Path]:
    """The files that a plan may read: it has not looked at the folder yet, where links may lead anywhere and a pipe never ends."""
    try:
        source = LocalFolder(folder)
        paths = [source.path(file.name).resolve() for file in sorted(source.root.glob(f"*{_SUFFIX}"))]
        return [path for path in paths if path.is_file()]
    except (OSError, SourceError, RuntimeError):  # RuntimeError: a link to itself, in Python below 3.13
        return []  # the plan says what is wrong with it


def begun_early(path: Path, stamp: Stamp) -> Future[str] | None:
    """The sha256 of a file that had this stamp when its hashing began early; None where it was not begun, or has changed since."""
    return _EARLY.take(path.resolve(), stamp)
