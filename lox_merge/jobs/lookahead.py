"""Who edits ahead of the writer: threads of the CPU matrix by matrix, or a device in batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from lox_merge.jobs.ahead import Ahead, Early
from lox_merge.jobs.batched_ahead import BatchedAhead
from lox_merge.jobs.edit import MatrixOutcome
from lox_merge.jobs.pipeline import Pipeline
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.select import TensorPlan
from lox_merge.jobs.work import Crew


class LooksAhead(Protocol):
    """Edits the tensors of shards ahead of the writer, who takes them in order."""

    def reach(self, position: int) -> None:
        """The sources of this shard are there."""
        ...

    def take(self, tensor: TensorPlan, early: Early | None = None) -> tuple[Tensor, list[MatrixOutcome]]:
        """The edited tensor and the results of its matrices. early: see Early."""
        ...

    def release(self, tensor: TensorPlan, size: int) -> None:
        """The writer is done with a tensor."""
        ...


LookAhead = Callable[[Plan, list[int], Crew], LooksAhead]


def look_ahead(plan: Plan, todo: list[int], crew: Crew) -> LooksAhead:
    """The usual way of the crew's device to the shards at these positions."""
    # What stays quantised is rounded onto each matrix's own grid: one by one.
    if crew.device.type == "cpu" or plan.requantised is not None:
        return Ahead(plan, todo, crew)
    return BatchedAhead(plan, todo, crew.owned(lambda: Pipeline(crew.device)))
