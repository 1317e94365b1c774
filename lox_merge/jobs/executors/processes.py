"""Worker processes on this machine: each takes the next shard when it is free; one that is lost has its shards done again."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import warnings
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lox_merge.errors import LoxMergeError, LoxMergeWarning
from lox_merge.jobs.engine import finish_shard
from lox_merge.jobs.executors.protocol import ShardJob
from lox_merge.jobs.executors.sizing import crew_of_each, devices_of, in_turn, longest_first
from lox_merge.jobs.executors.sources import SourceLedger
from lox_merge.jobs.executors.worker import work
from lox_merge.jobs.executors.writer import WorkerTask

# A shard whose workers are lost this often is not done again.
ATTEMPTS = 3
# Seconds that a process takes at most to be gone after it said so or was killed.
_END = 10


@dataclass(frozen=True)
class Processes:
    """See jobs.executors.protocol.Executor. workers: at most so many processes; they divide the cores, or the GPUs, among them."""

    workers: int
    reads_ahead: int = 0

    def write(self, job: ShardJob, todo: Sequence[int]) -> dict[int, dict[str, Any]]:
        collected = _Collected(job, longest_first(job.plan, todo))
        workers: list[_Worker] = []
        try:
            devices = devices_of(job.device)
            count = min(self.workers, len(todo))
            size = crew_of_each(job.plan, job.device, count, len(devices))
            for number in range(count):
                task = WorkerTask(job.plan, in_turn(devices, number), size, str(Path.cwd()))
                workers.append(_Worker(task))
                collected.give(workers[-1])
            while not collected.complete:
                for connection in wait([worker.connection for worker in workers]):
                    worker = next(worker for worker in workers if worker.connection is connection)
                    try:
                        event = worker.connection.recv()
                    except (EOFError, OSError):
                        collected.lost(worker)
                        workers[workers.index(worker)] = fresh = _Worker(worker.task)
                        collected.give(fresh)
                    else:
                        collected.take(worker, *event)
            for worker in workers:
                worker.dismiss()
        finally:
            for worker in workers:
                worker.end()
            for position in collected.unfinished:
                job.journal.partial(job.plan.shards[position].file).unlink(missing_ok=True)
        return collected.records


class _Worker:
    """One process and what it is about. held: shards that it was given and has not written to the disk yet."""

    def __init__(self, task: WorkerTask) -> None:
        self.task = task
        self.held: list[int] = []
        self.started = False
        self.connection, theirs = multiprocessing.Pipe()
        self._process = _process(theirs, task)
        self._process.start()
        theirs.close()  # so that its end is seen here

    def send(self, order: object) -> None:
        with contextlib.suppress(OSError):  # a process that is gone is found out by the next look at its connection
            self.connection.send(order)

    def dismiss(self) -> None:
        self.send(None)
        self._process.join(_END)

    def end(self) -> int | None:
        """Returns its exit code: -n for signal n."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join(_END)
        self.connection.close()
        return self._process.exitcode

    def exit_code(self) -> int | None:
        """Of a process whose connection ended."""
        self._process.join(_END)
        return self.end()


def _process(connection: Connection, task: WorkerTask) -> BaseProcess:
    """Forking a process with torch's threads is not safe. Where forking is safe at all, a server that has only imported is forked."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn").Process(target=work, args=(connection, task), daemon=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lox_merge.jobs.executors.worker"])
    return context.Process(target=work, args=(connection, task), daemon=True)


@dataclass
class _Collected:
    """What is still to be done, and what workers told of the rest. waiting: shards that nobody has, in order."""

    job: ShardJob
    order: list[int]
    records: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._waiting = deque(self.order)
        self._ledger = SourceLedger(self.job, self.order)
        self._written: dict[int, dict[str, Any]] = {}
        self._advanced: Counter[int] = Counter()
        self._attempts: Counter[int] = Counter()

    @property
    def complete(self) -> bool:
        return len(self.records) == len(self.order)

    @property
    def unfinished(self) -> list[int]:
        return [position for position in self.order if position not in self.records]

    def give(self, worker: _Worker) -> None:
        """The next shard to this worker, if there is one."""
        if self._waiting:
            position = self._waiting.popleft()
            worker.held.append(position)
            worker.send((position, self._ledger.to_hash(position)))

    def take(self, worker: _Worker, kind: str, *values: Any) -> None:
        """What a worker told. Raises what it failed with."""
        if kind == "failed":
            raise values[0]
        if kind == "started":
            worker.started = True
        elif kind == "free":
            self.give(worker)
        elif kind == "bytes":
            position, count = values
            self._advanced[position] += count
            self.job.progress.advance(count)
        elif kind == "warning":
            warnings.warn(values[0], LoxMergeWarning, stacklevel=2)
        elif kind == "hashed":
            self._ledger.found(*values)
            self._finish()
        else:
            position, record = values
            worker.held.remove(position)
            self._written[position] = record
            self._finish()

    def _finish(self) -> None:
        """Names and records every written shard whose sources are hashed."""
        for position in [position for position in self._written if self._ledger.complete(position)]:
            record = self._written.pop(position)
            self.records[position] = finish_shard(self.job.plan, position, record, self.job.journal, self._ledger.hashes(position))

    def lost(self, worker: _Worker) -> None:
        """Takes back what a worker held that ended on its own. Raises LoxMergeError where that is of no use."""
        code = worker.exit_code()
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        if not worker.started and (code is None or code >= 0):
            raise LoxMergeError(
                f'a worker process could not start ({how}). In a script, call lox_merge under `if __name__ == "__main__":`; '
                "workers=1 needs no processes."
            )
        files = ", ".join(self.job.plan.shards[position].file for position in worker.held) or "no shard"
        for position in worker.held:
            self._attempts[position] += 1
            if self._attempts[position] == ATTEMPTS:
                raise LoxMergeError(
                    f"{self.job.plan.shards[position].file}: {ATTEMPTS} workers were lost while they wrote it, the last by {how}"
                    f"{' (out of memory?)' if code == -signal.SIGKILL else ''}. Finished shards are kept in {self.job.plan.out}; "
                    "run the same command again with fewer workers to go on."
                )
            self.job.progress.advance(-self._advanced.pop(position, 0))
        self._waiting.extendleft(reversed(worker.held))
        warnings.warn(f"a worker was lost by {how} while it wrote {files}; another one takes its place", LoxMergeWarning, stacklevel=2)
