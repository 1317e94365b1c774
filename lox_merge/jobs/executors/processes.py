"""Worker processes on this machine: each takes the next shard when it is free; one that is lost is replaced."""

from __future__ import annotations

import contextlib
import multiprocessing
import secrets
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from lox_merge.errors import LoxMergeError
from lox_merge.jobs.executors.collect import Collected
from lox_merge.jobs.executors.protocol import ShardJob
from lox_merge.jobs.executors.server import process_context, start_server
from lox_merge.jobs.executors.sizing import crew_of_each, devices_of, in_turn, longest_first
from lox_merge.jobs.executors.worker import work
from lox_merge.jobs.executors.writer import WorkerTask

# Seconds that a process takes at most to be gone after it was told so.
_END = 10


@dataclass(frozen=True)
class Processes:
    """See jobs.executors.protocol.Executor. workers: at most so many processes; they divide the cores, or the GPUs, among them."""

    workers: int
    reads_ahead: int = 0

    def write(self, job: ShardJob, todo: Sequence[int]) -> dict[int, dict[str, Any]]:
        collected = Collected(job, longest_first(job.plan, todo))
        workers: list[_Worker] = []
        try:
            devices, count = devices_of(job.device), min(self.workers, len(todo))
            size = crew_of_each(job.plan, job.device, count, len(devices))
            for number in range(count):
                workers.append(_Worker(WorkerTask(job.plan, in_turn(devices, number), size, str(Path.cwd()))))
            while not collected.complete:
                by_connection = {worker.connection: worker for worker in workers}
                for connection in wait(list(by_connection)):
                    worker = by_connection[connection]  # type: ignore[index]
                    event = worker.receive()
                    if event is not None:
                        collected.take(worker, *event)
                        continue
                    how = worker.end_of_itself()
                    collected.lost(worker, how, " with fewer workers (out of memory?)" if "KILL" in how else "")
                    workers[workers.index(worker)] = _Worker(worker.task)
        finally:
            # All is named and recorded: nobody waits for interpreters to tidy up after themselves.
            for worker in workers:
                worker.end()
            job.journal.sweep()
        return collected.records


class _Worker:
    """One process; see jobs.executors.collect.Worker."""

    def __init__(self, task: WorkerTask) -> None:
        self.task = replace(task, mark=f".{secrets.token_hex(4)}")
        self.held: list[int] = []
        self._started = False
        self.connection, theirs = multiprocessing.Pipe()
        start_server()
        self._process = process_context().Process(target=work, args=(theirs, self.task), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is seen here

    def send(self, order: object) -> None:
        with contextlib.suppress(OSError):  # a process that is gone is found out by the next look at its connection
            self.connection.send(order)

    def receive(self) -> Any:
        """What it tells; None when it is gone."""
        try:
            event = self.connection.recv()
        except (EOFError, OSError):
            return None
        self._started = True
        return event

    def end(self) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join(_END)
        self.connection.close()

    def end_of_itself(self) -> str:
        """How it ended: 'signal SIGKILL'. Raises LoxMergeError where it never came to work, nor would another one."""
        self._process.join(_END)
        self.end()
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"signal {signal.Signals(-code).name}"
        if not self._started:
            raise LoxMergeError(
                f"a worker process could not start (exit code {code}). A script has to call lox_merge under "
                "`if __name__ == '__main__':`; one worker needs no process."
            )
        return f"exit code {code}"
