"""Which executor a request means."""

from __future__ import annotations

import torch

from lox_merge.errors import RequestError
from lox_merge.jobs.executors.processes import Processes
from lox_merge.jobs.executors.protocol import Executor
from lox_merge.jobs.executors.serial import Serial
from lox_merge.jobs.executors.sizing import Workers, settle_workers
from lox_merge.jobs.plan import Plan

PROCESSES, RAY = "processes", "ray"


def check_executor(executor: str, *, low_disk: bool = False, as_adapter: bool = False, weights_on_hub: bool = False) -> None:
    """Raises RequestError for one that is not known, or does not go with what is asked."""
    if executor == PROCESSES:
        if weights_on_hub:
            raise RequestError("--weights-on-hub is for workers on machines that share no storage: it goes with --executor ray.")
        return
    if executor != RAY and not executor.startswith("ray://"):
        raise RequestError(f"executor {executor!r} is not known; use {PROCESSES}, {RAY}, or ray://HOST:PORT for a cluster.")
    if low_disk or as_adapter:
        raise RequestError(f"--executor {executor} does not go with {'--low-disk' if low_disk else '--as-adapter'}. Leave one out.")


def choose_executor(executor: str, workers: Workers, plan: Plan, device: torch.device, *, stacklevel: int = 2) -> Executor:
    """Who writes the shards of a plan: this process alone, processes, or a Ray cluster. Warns where memory holds fewer than asked."""
    if executor == PROCESSES:
        count = settle_workers(workers, plan, device, stacklevel=stacklevel + 1)
        return Serial() if count == 1 else Processes(count)
    from lox_merge.jobs.executors.ray_workers import RayWorkers

    return RayWorkers(workers, executor)


def workers_of_dry_run(executor: str, workers: Workers, plan: Plan, device: torch.device) -> int:
    """How many would work. A cluster is not asked: what was asked for, and 1 for 'auto'."""
    if executor == PROCESSES:
        return settle_workers(workers, plan, device)
    return 1 if workers == "auto" else min(workers, len(plan.shards))
