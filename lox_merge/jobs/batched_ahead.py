"""Batches edited on a device ahead of the writer, as far as its memory and the host's allow."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lox_merge.checkpoint import dtypes
from lox_merge.jobs.batches import Batch, batch_bytes, batches_of
from lox_merge.jobs.edit import MatrixOutcome
from lox_merge.jobs.pipeline import Pipeline
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.select import TensorPlan


@dataclass
class _Tensor:
    """An output tensor, and what is known of its matrices."""

    out: Tensor
    outcomes: list[MatrixOutcome | None]


@dataclass(frozen=True)
class _InFlight:
    batch: Batch
    bytes: int
    future: Future[list[MatrixOutcome]]


class BatchedAhead:
    """As jobs.ahead.Ahead, for a device. Windows are numbered through all shards; the outputs of two of them are in memory at most."""

    def __init__(self, plan: Plan, todo: list[int], pipeline: Pipeline) -> None:
        self._plan, self._pipeline = plan, pipeline
        self._waiting: deque[Batch] = deque()
        self._window_of: dict[str, int] = {}
        first = 0
        for position in todo:
            numbered = [replace(batch, window=first + batch.window) for batch in batches_of(plan, position)]
            self._waiting.extend(numbered)
            self._window_of |= {member.tensor.name: batch.window for batch in numbered for member in batch.members}
            first = 1 + max((batch.window for batch in numbered), default=first - 1)
        self._in_flight: deque[_InFlight] = deque()
        self._tensors: dict[str, _Tensor] = {}
        self._window = 0
        # Where sources pass through the disk, those of later shards are not there yet.
        self._horizon = len(plan.shards) if plan.passing is None else -1

    def reach(self, position: int) -> None:
        """The sources of this shard are there."""
        self._horizon = max(self._horizon, position)

    def take(self, tensor: TensorPlan, early: object = None) -> tuple[Tensor, list[MatrixOutcome]]:
        """The edited tensor and the results of its matrices. Nothing is early: batches end faster than a disk writes them."""
        self._window = self._window_of[tensor.name]
        self._fill()
        while tensor.name not in self._tensors or None in self._tensors[tensor.name].outcomes:
            if not self._in_flight:
                self._start()  # whatever it takes: nothing else is in the way
            self._settle(self._in_flight.popleft())
            self._fill()
        done = self._tensors.pop(tensor.name)
        return done.out, [outcome for outcome in done.outcomes if outcome is not None]

    def release(self, tensor: TensorPlan, size: int) -> None:
        self._fill()

    def _settle(self, done: _InFlight) -> None:
        for member, outcome in zip(done.batch.members, done.future.result(), strict=True):
            self._tensors[member.tensor.name].outcomes[member.index] = outcome

    def _fill(self) -> None:
        while self._waiting and len(self._in_flight) < self._pipeline.depth:
            batch = self._waiting[0]
            taken = sum(running.bytes for running in self._in_flight)
            if batch.shard > self._horizon or batch.window > self._window + 1:
                return
            if taken and taken + batch_bytes(self._plan, batch) > self._pipeline.budget:
                return
            self._start()

    def _start(self) -> None:
        plan, batch = self._plan, self._waiting.popleft()
        sources, outs = [], []
        for member in batch.members:
            tensor, view = member.tensor, member.view
            if tensor.name not in self._tensors:
                code = plan.shards[batch.shard].header.tensors[tensor.name].dtype
                out = torch.empty(tensor.info.shape, dtype=dtypes.torch_dtype(code))
                self._tensors[tensor.name] = _Tensor(out, [None] * len(tensor.views))
            sources.append({role: view.select(checkpoint.tensor(tensor.name_in(role))) for role, checkpoint in plan.checkpoints.items()})
            outs.append(view.select(self._tensors[tensor.name].out))
        needed = batch_bytes(plan, batch)
        fits = needed <= self._pipeline.budget
        if not fits and len(batch.members) > 1:
            self._pipeline.warn_of_size(batch, needed)
        future = self._pipeline.submit(plan.edit, plan.triplets, batch, sources, outs, together=fits)
        self._in_flight.append(_InFlight(batch, needed, future))
