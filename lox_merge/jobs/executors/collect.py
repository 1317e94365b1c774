"""What workers tell, put together: names and records for written shards, and the work of lost workers given to others."""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lox_merge.errors import LoxMergeError, LoxMergeWarning
from lox_merge.jobs.engine import finish_sent_shard, finish_shard
from lox_merge.jobs.executors.protocol import ShardJob
from lox_merge.jobs.executors.sources import ledger_of
from lox_merge.jobs.executors.writer import WorkerTask
from lox_merge.jobs.stamps import SourceFile

# A shard whose workers are lost this often is not done again.
ATTEMPTS = 3
_NONE = -1  # what a worker holds that is lost before it is given a shard


class Worker(Protocol):
    """held: the shards that it was given and has not written to the disk yet, or has not read all the sources of that it is to hash."""

    task: WorkerTask
    held: list[int]

    def send(self, order: object) -> None: ...


@dataclass
class Collected:
    """What is still to be done, and what workers told of the rest. order: positions of the shards as they are to be begun."""

    job: ShardJob
    order: Sequence[int]
    records: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._waiting = deque(self.order)
        self._ledger = ledger_of(self.job, self.order)
        self._written: dict[int, tuple[Path, dict[str, Any]]] = {}
        self._to_hash: dict[int, set[SourceFile]] = {}  # of shards that are held: what their workers have not hashed yet
        self._idle: list[Worker] = []
        self._advanced: Counter[int] = Counter()
        self._attempts: Counter[int] = Counter()

    @property
    def complete(self) -> bool:
        return len(self.records) == len(self.order)

    def give(self, worker: Worker) -> None:
        """The next shard to this worker, as soon as there is one."""
        if self._waiting:
            position = self._waiting.popleft()
            worker.held.append(position)
            files = self._ledger.to_hash(position)
            self._to_hash[position] = set(files)
            worker.send((position, files))
        else:
            self._idle.append(worker)

    def take(self, worker: Worker, kind: str, *values: Any) -> None:
        """What a worker told (see jobs.executors.writer). Raises what it failed with."""
        if kind == "failed":
            raise values[0]
        if kind in ("started", "free"):
            self.give(worker)
        elif kind == "bytes":
            position, count = values
            self._advanced[position] += count
            self.job.progress.advance(count)
        elif kind == "warning":
            warnings.warn(values[0], LoxMergeWarning, stacklevel=2)
        elif kind == "hashed":
            self._ledger.found(*values)
            for position in list(worker.held):
                self._to_hash[position].discard(values[0])
                self._let_go(worker, position)
            self._finish()
        elif kind == "written":
            position, record = values
            self._written[position] = self._partial(worker, position), record
            self._let_go(worker, position)
            self._finish()

    def _let_go(self, worker: Worker, position: int) -> None:
        """Nothing is lost with this worker any more: until its sources are hashed, nobody else would read them."""
        if (position in self._written or position in self.records) and not self._to_hash[position]:
            worker.held.remove(position)

    def _finish(self) -> None:
        """Names and records every written shard whose sources are hashed; one that was sent to a store keeps no file here."""
        for position in [position for position in self._written if self._ledger.complete(position)]:
            partial, record = self._written[position]
            sources = self._ledger.hashes(position)
            if self.job.plan.store:
                self.records[position] = finish_sent_shard(self.job.plan, position, record, self.job.journal, sources)
            else:
                self.records[position] = finish_shard(self.job.plan, position, partial, record, self.job.journal, sources)
            del self._written[position]

    def lost(self, worker: Worker, how: str, remedy: str = "") -> None:
        """Takes back what a worker held that is gone. how: 'signal SIGKILL'. Raises LoxMergeError for a shard that lost its worker
        ATTEMPTS times."""
        plan, held = self.job.plan, [position for position in worker.held if position not in self.records]
        files = ", ".join(plan.shards[position].file for position in held)
        for position in held or [_NONE]:
            self._attempts[position] += 1
            if self._attempts[position] == ATTEMPTS:
                when = f"while they wrote {plan.shards[position].file}" if held else "before they wrote anything"
                raise LoxMergeError(
                    f"{ATTEMPTS} workers were lost {when}, the last one by {how}. Finished shards are kept in {plan.out}; "
                    f"run the same command again to go on{remedy}."
                )
            self.job.progress.advance(-self._advanced.pop(position, 0))
        for position in held:
            self._written.pop(position, None)
            self._partial(worker, position).unlink(missing_ok=True)
        self._waiting.extendleft(reversed(held))
        # Those that found nothing to do: on a cluster another worker may be long in coming.
        idle, self._idle = [other for other in self._idle if other is not worker], []
        for other in idle:
            self.give(other)
        if held:
            warnings.warn(f"a worker was lost by {how} while it wrote {files}; another one does it again", LoxMergeWarning, stacklevel=2)

    def _partial(self, worker: Worker, position: int) -> Path:
        return self.job.journal.partial(self.job.plan.shards[position].file, worker.task.mark)
