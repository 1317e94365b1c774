"""A worker that is asked for its news: what an actor of Ray holds, on whichever machine."""

from __future__ import annotations

import socket
import threading
from queue import Empty, SimpleQueue
from typing import Any

from lox_merge.errors import RequestError
from lox_merge.jobs.executors.worker import Order, serve
from lox_merge.jobs.executors.workspace import Workspace
from lox_merge.jobs.executors.writer import WorkerTask
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.manifest import tool

# Seconds that a question for news may wait for some.
_PATIENCE = 5.0


class RemoteWorker:
    """Writes shards in a thread of its own; orders and news go by calls."""

    def __init__(self, task: WorkerTask) -> None:
        self._orders: SimpleQueue[Order] = SimpleQueue()
        self._news: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
        self._workspace: Workspace | None = None
        problem = _unfit(task)
        if problem is not None:
            self._tell("failed", RequestError(f"a worker on {socket.gethostname()} {problem}"))
        else:
            self._workspace = Workspace() if task.plan.store else None
            folder = self._workspace.folder if self._workspace else None
            threading.Thread(target=serve, args=(task, self._orders, self._tell, folder), daemon=True).start()

    def _tell(self, kind: str, *values: Any) -> None:
        self._news.put((kind, *values))

    def order(self, order: Order) -> None:
        self._orders.put(order)

    def clear_up(self) -> None:
        """Leaves nothing on this machine; whoever asks for it ends the process then, whatever it is at."""
        if self._workspace:
            self._workspace.remove()

    def news(self) -> list[tuple[Any, ...]]:
        """All that was not told yet; waits a little for something. May be empty."""
        try:
            found = [self._news.get(timeout=_PATIENCE)]
        except Empty:
            return []
        while not self._news.empty():
            found.append(self._news.get())
        return found


def _unfit(task: WorkerTask) -> str | None:
    """Why a worker on this machine could not write the same bytes to the same place."""
    job = {"tool": task.tool} if task.tool else Journal(task.plan.out).job()
    if job is None:
        return (
            f"does not see the output {task.plan.out}: workers on several machines need it, and local sources, under the same path on "
            "storage that they share. Give such a folder, or --push REPO --weights-on-hub, or leave --executor out."
        )
    if job["tool"] != tool():
        return f"has {_words(tool())}, and the job was begun with {_words(job['tool'])}. Install the same versions on all machines."
    return None


def _words(versions: dict[str, str]) -> str:
    return f"{versions['name']} {versions['version']} with torch {versions['torch']}"
