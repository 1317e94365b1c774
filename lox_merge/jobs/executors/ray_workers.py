"""Workers on the machines of a Ray cluster, or of a Ray that is started on this one. Tensors stay where they are read and written."""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from lox_merge.errors import LoxMergeWarning, RequestError
from lox_merge.jobs.engine import typical_cost
from lox_merge.jobs.estimate import peak_memory
from lox_merge.jobs.executors.collect import Collected
from lox_merge.jobs.executors.protocol import ShardJob
from lox_merge.jobs.executors.remote import RemoteWorker
from lox_merge.jobs.executors.sizing import Workers, longest_first
from lox_merge.jobs.executors.writer import WorkerTask
from lox_merge.jobs.manifest import tool
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.store import plan_for_elsewhere
from lox_merge.jobs.work import IN_FLIGHT_BYTES, CrewSize, available_cores

# What users pass on; 'ray' alone is RAY_ADDRESS, or a Ray of this machine alone.
LOCAL = "ray"
# Between two looks at whether Ctrl-C was pressed, seconds.
_LOOK = 0.5
# Seconds that workers have to clear their machines up.
_END = 10.0


@dataclass
class RayWorkers:
    """See jobs.executors.protocol.Executor. asked: how many workers; 'auto' is one a machine, or one a GPU. address: as ray.init takes it."""

    asked: Workers
    address: str = LOCAL
    reads_ahead: int = 0
    workers: int = 1

    def write(self, job: ShardJob, todo: Sequence[int]) -> dict[int, dict[str, Any]]:
        with connected(self.address) as ray, _told_to_stop() as stopped:
            count, options, size = _shares(ray, job.plan, job.device, self.asked, len(todo))
            self.workers = count
            collected = Collected(job, longest_first(job.plan, todo))
            # Of the GPUs that a worker sees, Ray has left it one.
            task = WorkerTask(_for_workers(job.plan), torch.device(job.device.type), size, None, tool=tool() if job.plan.store else None)
            workers: list[_Worker] = []
            try:
                for _ in range(count):
                    workers.append(_Worker(ray, task, options))
                while not collected.complete:
                    if stopped.is_set():
                        raise KeyboardInterrupt
                    asked = {worker.news: worker for worker in workers}
                    ready, _ = ray.wait(list(asked), num_returns=1, timeout=_LOOK)
                    for worker in [asked[news] for news in ready]:
                        try:
                            news = ray.get(worker.news)
                        except ray.exceptions.RayActorError:
                            collected.lost(worker, "the end of its process or machine")
                            workers[workers.index(worker)] = _Worker(ray, task, options)
                            continue
                        for event in news:
                            collected.take(worker, *event)
                        worker.ask()
            finally:
                if job.plan.store and workers:  # who is gone or too busy leaves it to the next worker of its machine to clear up
                    ray.wait([worker.clear_up() for worker in workers], num_returns=len(workers), timeout=_END)
                for worker in workers:
                    worker.end()
                job.journal.sweep()
            return collected.records


class _Worker:
    """One actor; see jobs.executors.collect.Worker. news: what it was asked for last."""

    def __init__(self, ray: Any, task: WorkerTask, options: dict[str, Any]) -> None:
        self.task = replace(task, mark=f".{secrets.token_hex(4)}")
        self.held: list[int] = []
        self._ray = ray
        actor = ray.remote(RemoteWorker).options(max_concurrency=2, max_restarts=0, **options)
        self._actor = actor.remote(self.task)
        self.ask()

    def ask(self) -> None:
        self.news = self._actor.news.remote()

    def send(self, order: object) -> None:
        self._actor.order.remote(order)

    def clear_up(self) -> Any:
        return self._actor.clear_up.remote()

    def end(self) -> None:
        self._ray.kill(self._actor)


def _for_workers(plan: Plan) -> Plan:
    return plan_for_elsewhere(plan) if plan.store else replace(plan, out=plan.out.absolute())


@contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """Set by Ctrl-C and SIGTERM. Ray runs code of its own in finalisers, where an exception that these raise would be lost."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module ray, connected. A Ray that was connected before stays so. Raises RequestError where there is none to connect to."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise RequestError(f"--executor ray needs the package ray ({error}). Install it: pip install 'lox-merge[ray]'.") from error
    if ray.is_initialized():
        yield ray
        return
    # ray would report its use to its makers, and put its own handler in the place of the one that ends a job in order.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address == LOCAL and "RAY_ADDRESS" not in os.environ:
            ray.init(address="local", num_cpus=available_cores(), include_dashboard=False, **quiet)
        else:
            ray.init(address=None if address == LOCAL else address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(
            f"no Ray answers at {address}: {reason.rstrip('.')}. Start one (ray start --head), or give its address; "
            "one that asks for a token needs RAY_AUTH_MODE=token here, and the token."
        ) from error
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
    # Whatever log_to_driver says, ray prints the loss of a worker to standard output, where the result is expected; some only at its end.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield ray
        finally:
            ray.shutdown()


def _shares(ray: Any, plan: Plan, device: torch.device, asked: Workers, shards: int) -> tuple[int, dict[str, Any], CrewSize]:
    """How many workers, what each of them asks of Ray, and its crew."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    cuda = device.type == "cuda"
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if not nodes or (cuda and not gpus):
        raise RequestError(f"the Ray cluster has no {'GPU' if nodes else 'CPU'} to work with. Add machines, or use --device cpu.")
    if cuda:
        nodes = [node for node in nodes if node.get("GPU", 0) >= 1]
    count = min(shards, gpus if cuda else len(nodes)) if asked == "auto" else min(shards, asked)
    each = peak_memory(plan, device)
    places = [places_of(node, each, cuda) for node in nodes]
    fit = max(1, sum(places))
    if fit < count:
        if asked != "auto":
            what = "memory and GPUs" if cuda else "memory"
            warnings.warn(f"the Ray cluster has {what} for {fit} of {count} workers: {fit} of them work", LoxMergeWarning, stacklevel=2)
        count = fit
    cores = cores_each([node["CPU"] for node in nodes], count, places if sum(places) else None)
    usual = CrewSize.of(device, typical_cost(plan))
    if not cuda:
        matrices = max(1, min(int(cores) // usual.cores, IN_FLIGHT_BYTES // max(1, typical_cost(plan))))
        # A matrix takes as many cores as it would here: the bytes stay the same.
        usual = CrewSize(matrices, usual.cores)
    # Ray places workers by what they ask for; where none fits, one works all the same, and asks for nothing that is not there.
    memory = {"memory": each} if sum(places) else {}
    return count, {"num_cpus": cores, "num_gpus": 1 if cuda else 0, **memory}, usual


def places_of(machine: Mapping[str, float], each: int, cuda: bool) -> int:
    """How many workers of `each` bytes a machine holds: as Ray knows its memory and GPUs."""
    by_memory = int(machine.get("memory", 0) // each)
    return min(by_memory, int(machine.get("GPU", 0))) if cuda else by_memory


def cores_each(machines: Sequence[float], workers: int, places: Sequence[int] | None = None) -> int:
    """The most cores that each of so many workers can have, so that all of them find a place; 0 where they are more than cores.

    places: how many workers each machine holds at most, for what it has beside cores.
    """
    most = places or [workers] * len(machines)

    def found(cores: int) -> int:
        return sum(min(int(machine // cores), place) for machine, place in zip(machines, most, strict=True))

    return next((cores for cores in range(int(max(machines)), 0, -1) if found(cores) >= workers), 0)
