"""A worker: orders come in, what happens goes out. As a process of this machine it ends with whoever started it."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from lox_merge.errors import Interrupted, LoxMergeError, LoxMergeWarning
from lox_merge.jobs.executors.sending_writer import SendingWriter
from lox_merge.jobs.executors.writer import ShardWriter, Tell, WorkerTask
from lox_merge.jobs.stamps import SourceFile

Order = tuple[int, list[SourceFile]] | None


def serve(task: WorkerTask, orders: SimpleQueue[Order], send: Tell, folder: Path | None = None) -> None:
    """Writes the shards that are ordered until None comes. Never raises: what went wrong is told. folder: for what goes to a store."""

    def tell(kind: str, *values: Any) -> None:
        send(kind, *(_portable(value) if isinstance(value, BaseException) else value for value in values))

    def warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, LoxMergeWarning):
            tell("warning", str(message))

    warnings.simplefilter("always", LoxMergeWarning)
    warnings.showwarning = warn
    writer = None
    try:
        if task.folder is not None:
            os.chdir(task.folder)
        writer = ShardWriter(task, tell) if folder is None else SendingWriter(task, tell, folder)
        tell("started")
        while (order := orders.get()) is not None:
            writer.write(*order)
        writer.wait()
    except Interrupted:
        pass
    except BaseException as error:
        tell("failed", error)
    finally:
        if writer is not None:
            writer.close()


def work(connection: Connection, task: WorkerTask) -> None:
    """Serves the process at the other end of `connection`."""
    # Ctrl-C and SIGTERM reach the whole group: the process that was asked decides, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    lock = threading.Lock()

    def send(kind: str, *values: Any) -> None:
        try:
            with lock:
                connection.send((kind, *values))
        except OSError:
            os._exit(1)

    orders: SimpleQueue[Order] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, orders), daemon=True).start()
    serve(task, orders, send)


def _listen(connection: Connection, orders: SimpleQueue[Order]) -> None:
    try:
        while True:
            orders.put(connection.recv())
    except (EOFError, OSError):
        # Whoever started this process is gone, and another run may be about to write the same folder.
        os._exit(1)


def _portable(error: BaseException) -> BaseException:
    """The exception itself where it arrives as it is; any other with its traceback as text."""
    try:
        arrived = pickle.loads(pickle.dumps(error))
    except Exception:
        arrived = None
    if isinstance(error, (LoxMergeError, OSError, MemoryError)) and type(arrived) is type(error) and str(arrived) == str(error):
        return error
    return RuntimeError("in a worker:\n" + "".join(traceback.format_exception(error)))
