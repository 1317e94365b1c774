"""sha256 of source files, computed beside the work: the threads that hash read ahead, so they are also the prefetch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lox_merge.jobs.atomic import sha256_of
from lox_merge.jobs.early import begun_early
from lox_merge.jobs.stamps import SourceFile, Stamp, check_stamp, stamp
from lox_merge.jobs.work import available_cores

# A core hashes 1.5 GB/s, which many cores or a GPU would wait for; a few files at a time are as much as most disks like to read.
_CORES_EACH, _MOST_THREADS = 4, 4


def hashing_threads(cores: int) -> int:
    return max(1, min(_MOST_THREADS, cores // _CORES_EACH))


class SourceHasher:
    """Hashes files in the order in which shards need them, at most `ahead` shards ahead of the work.

    path_of: where a file is. stamp_first: what it looked like before anything of it was read; by default, what it looks like now.
    Reading further ahead than one would push what is about to be used out of the page cache on a machine with little memory.
    """

    def __init__(
        self,
        needed: list[list[SourceFile]],
        path_of: Callable[[SourceFile], Path],
        stamp_first: Callable[[SourceFile], Stamp] | None = None,
        ahead: int = 1,
    ) -> None:
        self._ahead = ahead
        self._path_of = path_of
        self._stamp_first = stamp_first or (lambda file: stamp(file, path_of(file)))
        self._needed = needed
        self._futures: dict[SourceFile, Future[str]] = {}
        self._stamps: dict[SourceFile, Stamp] = {}
        self._pool = ThreadPoolExecutor(hashing_threads(available_cores()), thread_name_prefix="hash")
        self._lock = threading.Lock()
        self._stop = threading.Event()
        if ahead:
            # Tensors are read further ahead than files are hashed: what changes in between would be written under the hash of another file.
            for file in dict.fromkeys(file for files in needed for file in files):
                self._stamps[file] = self._stamp_first(file)

    def start_shard(self, position: int) -> None:
        """Shard number `position` is about to be worked on: queue its files and the next shard's."""
        self._queue([file for files in self._needed[position : position + 1 + self._ahead] for file in files])

    def _queue(self, files: list[SourceFile]) -> None:
        with self._lock:
            for file in files:
                if file not in self._futures:
                    if file not in self._stamps:
                        self._stamps[file] = self._stamp_first(file)
                    path = self._path_of(file)
                    self._futures[file] = begun_early(path, self._stamps[file]) or self._pool.submit(sha256_of, path, self._stop)

    def hashes(self, position: int, known: Mapping[SourceFile, str] | None = None) -> dict[SourceFile, str]:
        """Hashes of the files of one shard; waits for them. Raises SourceChangedError when a file changed meanwhile.

        known: hashes of files that need not be read.
        """
        found = dict(known or {})
        if not found:
            self.start_shard(position)
        unknown = [file for file in self._needed[position] if file not in found]
        self._queue(unknown)
        for file in unknown:
            found[file] = self._futures[file].result()
            check_stamp(file, self._path_of(file), self._stamps[file])
        return found

    def known(self) -> dict[SourceFile, tuple[str, Stamp]]:
        """Hash and stamp of every file that was read to its end."""
        with self._lock:
            done = {file: future for file, future in self._futures.items() if future.done() and not future.cancelled() and not future.exception()}
            return {file: (future.result(), self._stamps[file]) for file, future in done.items()}

    def close(self) -> None:
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
