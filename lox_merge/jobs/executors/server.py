"""The process that worker processes are forked from. To be started before torch is imported here, so this imports nothing of it."""

from __future__ import annotations

import multiprocessing
import sys
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
    if workers != "1" and executor == "processes" and isinstance(process_context(), ForkServerContext):
        forkserver.ensure_running()
