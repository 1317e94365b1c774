"""Matrices edited ahead of the writer, within a memory budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lox_merge.checkpoint import dtypes
from lox_merge.jobs.edit import MatrixOutcome
from lox_merge.jobs.in_flight import InFlight
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.select import TensorPlan
from lox_merge.jobs.work import IN_FLIGHT_BYTES, Crew

# Told of tensors of the same shard that are edited before the one that the writer waits for, in the writer's thread; each once at most.
Early = Callable[[TensorPlan, Tensor], None]


@dataclass
class _Job:
    """One tensor being edited: its output, and the matrices still to come."""

    shard: int
    tensor: TensorPlan
    bytes: int
    out: Tensor | None = None
    submitted: int = 0
    futures: deque[Future[MatrixOutcome]] = field(default_factory=deque)
    told: bool = False

    @property
    def edited(self) -> bool:
        """Whether all of it is done, and well."""
        whole = self.submitted == len(self.tensor.views)
        return whole and all(future.done() and future.exception() is None for future in self.futures)


class _Memory:
    """Memory of tensors that are written, for those to come. Fresh memory costs a page fault every 4 kB, on virtual machines a dear one."""

    def __init__(self) -> None:
        self._spare: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        """(size or up to twice as much,) bytes."""
        for place, buffer in enumerate(self._spare):
            if size <= buffer.numel() <= 2 * size:
                return self._spare.pop(place)
        return torch.empty(size, dtype=torch.uint8)

    def give(self, buffer: Tensor) -> None:
        self._spare = sorted([*self._spare, buffer], key=torch.numel)

    def keep(self, room: int) -> None:
        """Lets go of what is more than `room` bytes, the largest first."""
        while sum(map(torch.numel, self._spare)) > max(0, room):
            self._spare.pop()


class Ahead:
    """Submits matrices of the tensors to come, in order, while the memory budget allows; the writer takes them in order."""

    def __init__(self, plan: Plan, todo: list[int], crew: Crew) -> None:
        self._plan, self._crew = plan, crew
        self._waiting: deque[_Job] = deque(
            _Job(position, tensor, plan.shards[position].bytes_in_memory(tensor))
            for position in todo
            for tensor in plan.shards[position].tensors
            if tensor.action == "edit"
        )
        self._started: deque[_Job] = deque()
        self._in_flight = InFlight(IN_FLIGHT_BYTES + plan.largest_edit_bytes)
        self._memory, self._lent = _Memory(), dict[str, Tensor]()
        # Where sources pass through the disk, those of later shards are not there yet.
        self._horizon = len(plan.shards) if plan.passing is None else -1

    def reach(self, position: int) -> None:
        """The sources of this shard are there."""
        self._horizon = max(self._horizon, position)

    def take(self, tensor: TensorPlan, early: Early | None = None) -> tuple[Tensor, list[MatrixOutcome]]:
        """The edited tensor and the results of its matrices. Its memory counts until `release`. early: see Early."""
        if not self._started:
            self._start_next()
        job = self._started[0]
        assert job.tensor is tensor, "tensors are written in the order in which they were planned"
        results: list[MatrixOutcome] = []
        while len(results) < len(tensor.views):
            if not job.futures:
                self._submit_view(job)
            future = job.futures.popleft()
            while not future.done():
                self._fill()
                if early is None or not self._tell_of_one(job, early):
                    self._in_flight.wait(future)
            self._fill()
            results.append(future.result())
        self._started.popleft()
        assert job.out is not None
        return job.out, results

    def release(self, tensor: TensorPlan, size: int) -> None:
        self._in_flight.add(-size)
        self._memory.give(self._lent.pop(tensor.name))
        self._fill()

    def _tell_of_one(self, awaited: _Job, early: Early) -> bool:
        for job in self._started:
            if job is not awaited and not job.told and job.shard == awaited.shard and job.edited:
                assert job.out is not None
                job.told = True
                early(job.tensor, job.out)
                return True
        return False

    def _fill(self) -> None:
        while True:
            job = self._started[-1] if self._started else None
            if job is None or job.submitted == len(job.tensor.views):
                if not self._waiting or self._waiting[0].shard > self._horizon:
                    return
                if not self._fits(self._waiting[0].bytes + self._cost(self._waiting[0], 0)):
                    return
                self._start_next()
            elif self._fits(self._cost(job, job.submitted)):
                self._submit_view(job)
            else:
                return

    def _fits(self, cost: int) -> bool:
        return cost <= self._in_flight.room

    def _cost(self, job: _Job, position: int) -> int:
        return self._plan.working_memory(job.tensor, job.tensor.views[position])

    def _start_next(self) -> None:
        job = self._waiting.popleft()
        code = self._plan.shards[job.shard].code_in_memory(job.tensor)
        memory = self._lent[job.tensor.name] = self._memory.take(job.bytes)
        job.out = memory[: job.bytes].view(dtypes.torch_dtype(code)).view(job.tensor.info.shape)
        self._in_flight.add(job.bytes)
        self._started.append(job)
        self._submit_view(job)

    def _submit_view(self, job: _Job) -> None:
        view, cost = job.tensor.views[job.submitted], self._cost(job, job.submitted)
        job.submitted += 1
        assert job.out is not None
        sources = {role: view.select(checkpoint.tensor(job.tensor.name_in(role))) for role, checkpoint in self._plan.checkpoints.items()}
        edit, grid = self._plan.edit, self._plan.grid(job.tensor, view)
        future = self._crew.submit(edit.matrix, sources, view.select(job.out), view, job.tensor, self._crew.device, self._plan.triplets, grid)
        self._in_flight.watch(future, cost)
        self._memory.keep(self._in_flight.room)
        job.futures.append(future)
