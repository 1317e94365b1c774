"""The process that worker processes are forked from. To be started before torch is imported here, so this imports nothing of it."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, SpawnContext


def process_context() -> ForkServerContext | SpawnContext:
    """Forking a process with torch's threads is not safe. Where forking is safe at all, a server that has only imported is forked."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lox_merge.jobs.executors.worker"])
    return context


def warm_up(workers: str, executor: str) -> None:
    """Where --workers and --executor ask for processes: has the server import what they need, which takes seconds, from now on."""
    if workers != "1" and executor == "processes":
        start_server()


def start_server() -> None:
    """Begins the server, if processes are forked here and it does not run yet, with Ctrl-C ignored, which its children inherit.

    A worker that a Ctrl-C finds before it has come to work would print a traceback of its own; the process that asked ends it.
    """
    if not isinstance(process_context(), ForkServerContext):
        return
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        forkserver.ensure_running()
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)
