"""A folder of this machine for one worker, which goes with it; what killed ones left is cleared by the next one's start."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK = ".lock"


class Workspace:
    """Made in the machine's folder for temporary files (TMPDIR), which has to hold the sources of one shard and two finished shards."""

    def __init__(self) -> None:
        user = os.getuid() if hasattr(os, "getuid") else "workers"
        root = Path(tempfile.gettempdir()) / f"lox-merge-{user}"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _own(root):  # in a folder that all may write to, whoever comes first may have made it
            root = Path(tempfile.mkdtemp(prefix="lox-merge-"))
        with FileLock(root / _LOCK):
            for left in root.glob("worker-*"):
                _remove_unused(left)
            self.folder = Path(tempfile.mkdtemp(prefix="worker-", dir=root))
            # Held as long as the process lives, however it ends. Not by thread: another one may remove the folder.
            self._lock = FileLock(self.folder / _LOCK, thread_local=False)
            self._lock.acquire()

    def remove(self) -> None:
        self._lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)


def _own(folder: Path) -> bool:
    """Whether a folder is this user's, no link, and closed to others."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and (not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022))


def _remove_unused(folder: Path) -> None:
    with suppress(Timeout, OSError), FileLock(folder / _LOCK, timeout=0):
        shutil.rmtree(folder, ignore_errors=True)
