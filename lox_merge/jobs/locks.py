"""Locks between processes."""

from __future__ import annotations

import warnings

from filelock import BaseFileLock, SoftFileLock

from lox_merge.errors import LoxMergeWarning


def acquire(lock: BaseFileLock, *, timeout: float = -1) -> None:
    """Takes a lock; it goes with the process that holds it, however that ends.

    Warns where the disk knows no such locks and a file is one instead: then that file stays when its owner is killed on another machine.
    Raises filelock.Timeout.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flock not supported")  # said below, with what to do
        lock.acquire(timeout=timeout)
    if isinstance(lock, SoftFileLock):
        warnings.warn(
            f"the disk of {lock.lock_file} has no locks (flock): a file is used instead, which stays where a job is killed on another machine. "
            "If a run is refused though nothing else is at work there, remove that file.",
            LoxMergeWarning,
            stacklevel=3,
        )
