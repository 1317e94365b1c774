"""The work of one worker: shards written and synced one after another, its share of the sources hashed beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lox_merge.errors import Interrupted
from lox_merge.jobs.atomic import sha256_of
from lox_merge.jobs.direct_file import DirectFile
from lox_merge.jobs.engine import make_durable, source_path, write_shard
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.lookahead import look_ahead
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.stamps import SourceFile
from lox_merge.jobs.work import Crew, CrewSize

# What a worker tells: its kind and its values.
#   bytes (position, count): so much of a shard is written      hashed (file, sha256)
#   started (), free (): it can take a shard                    written (position, record): whole and synced, under its temporary name
#   failed (exception)                                          warning (text)
Tell = Callable[..., None]


@dataclass(frozen=True)
class WorkerTask:
    """What a worker has to know. Plain data: it opens the checkpoints itself, and no tensor travels.

    folder: the working directory; None where no path depends on it. mark: of the temporary files of this worker and of no other.
    tool: versions that decide the bytes, where no journal that the worker can read says them.
    """

    plan: Plan
    device: torch.device
    size: CrewSize
    folder: str | None
    mark: str = ""
    tool: dict[str, str] | None = None


class ShardWriter:
    """Writes shards as the serial run does, but leaves name and record to the one who collects them."""

    def __init__(self, task: WorkerTask, tell: Tell) -> None:
        self._plan, self._tell = task.plan, tell
        self._journal, self._mark = Journal(task.plan.out), task.mark
        self._crew = Crew(task.device, task.size)
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._finishing = ThreadPoolExecutor(1, thread_name_prefix="finish")
        self._last: Future[None] | None = None
        self._hashes: dict[int, list[Future[None]]] = {}
        self._stop = threading.Event()

    def write(self, position: int, to_hash: Sequence[SourceFile]) -> None:
        """Writes one shard; the disk may still have to take it when this returns. to_hash: source files to hash meanwhile."""
        self._hashes[position] = [self._hashing.submit(self._hash, source) for source in to_hash]
        ahead = look_ahead(self._plan, [position], self._crew)
        ahead.reach(position)
        with self._crew.threads():
            file, record = write_shard(self._plan, position, self._partial(position), ahead, _Told(self._tell, position))
        self.wait()  # at most one finished shard waits for the disk
        self._last = self._finishing.submit(self._end, file, position, record)
        self._tell("free")

    def wait(self) -> None:
        """Until every shard is on the disk, or what prevented it is told."""
        if self._last is not None:
            self._last.result()

    def _end(self, file: DirectFile, position: int, record: dict[str, Any]) -> None:
        try:
            self._finish(file, position, record)
        except Exception as error:
            self._tell("failed", error)  # nobody looks at the future while the worker waits for an order

    def _finish(self, file: DirectFile, position: int, record: dict[str, Any]) -> None:
        make_durable(file, self._partial(position))
        self._tell("written", position, record)

    def _partial(self, position: int) -> Path:
        return self._journal.partial(self._plan.shards[position].file, self._mark)

    def _hash(self, source: SourceFile) -> None:
        try:
            self._tell("hashed", source, sha256_of(source_path(self._plan, source), self._stop))
        except Interrupted:
            pass  # the worker ends
        except Exception as error:
            self._tell("failed", error)

    def close(self) -> None:
        self._stop.set()
        for part in (self._hashing, self._finishing):
            part.shutdown(wait=True, cancel_futures=True)
        self._crew.close()
        self._plan.close()


@dataclass(frozen=True)
class _Told:
    """Progress that is told to the one who collects it."""

    tell: Tell
    position: int

    def advance(self, count: int) -> None:
        self.tell("bytes", self.position, count)
