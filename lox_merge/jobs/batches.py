"""Which matrices of a shard are edited together on a device: a function of the plan alone, so that equal jobs do equal arithmetic.

Memory that happens to be free decides how many batches are in flight, never what is in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

from lox_merge.jobs.layout import MatrixView
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.select import TensorPlan
from lox_merge.maths.batched_spectral import batched_memory, batched_rank

# Entries of a batch: 1 GiB in float32. Four MLP matrices of an 8B model, one of a 70B model: enough work for a GPU to hide what the
# host does between products.
BATCH_ENTRIES = 2**28
# More matrices than this gain nothing, and the slowest keeps the others waiting.
LARGEST_BATCH = 16
# Tensors are taken together within stretches of a shard of about this many bytes: the outputs of two stretches are in host memory. Half as
# much leaves so few attention matrices of an 8B model in a batch that a GPU is done with them before the host has told it more.
WINDOW_BYTES = 2**31


@dataclass(frozen=True)
class Member:
    """One matrix of a batch: `tensor.views[index]`."""

    tensor: TensorPlan
    index: int

    @property
    def view(self) -> MatrixView:
        return self.tensor.views[self.index]

    @property
    def name(self) -> str:
        return self.tensor.name + self.view.label


@dataclass(frozen=True)
class Batch:
    """Matrices of one shape, dtype and rank rule. shard: position in the plan; window: stretch of the shard."""

    shard: int
    window: int
    members: tuple[Member, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.members[0].view.shape


def batch_size(shape: tuple[int, int]) -> int:
    return max(1, min(LARGEST_BATCH, BATCH_ENTRIES // max(1, shape[0] * shape[1])))


def batches_of(plan: Plan, shard: int) -> list[Batch]:
    """Every matrix to be edited in a shard, in batches ordered by their first matrices."""
    window, filled = 0, 0
    groups: dict[Hashable, list[list[Member]]] = {}
    for tensor in plan.shards[shard].tensors:
        if tensor.action != "edit":
            continue
        size = plan.shards[shard].header.tensors[tensor.name].bytes
        if filled and filled + size > WINDOW_BYTES:
            window, filled = window + 1, 0
        filled += size
        for index, view in enumerate(tensor.views):
            batches = groups.setdefault((window, view.shape, tensor.rank, _dtypes(plan, shard, tensor)), [[]])
            if len(batches[-1]) == batch_size(view.shape):
                batches.append([])
            batches[-1].append(Member(tensor, index))
    order = {tensor.name: place for place, tensor in enumerate(plan.shards[shard].tensors)}
    found = [Batch(shard, key[0], tuple(members)) for key, batches in groups.items() for members in batches]  # type: ignore[index]
    return sorted(found, key=lambda batch: (order[batch.members[0].tensor.name], batch.members[0].index))


def outputs_bytes(plan: Plan) -> int:
    """The most bytes that outputs wait in on the host: those of two stretches, one after another."""
    sizes: list[int] = []
    for position, shard in enumerate(plan.shards):
        windows = Counter[int]()
        for tensor, window in {member.tensor.name: batch.window for batch in batches_of(plan, position) for member in batch.members}.items():
            windows[window] += shard.header.tensors[tensor].bytes
        sizes += [size for _, size in sorted(windows.items())]
    return max((sum(sizes[start : start + 2]) for start in range(len(sizes))), default=0)


def batch_bytes(plan: Plan, batch: Batch) -> int:
    """Upper estimate of the bytes that a batch takes on the device."""
    return sum(_matrix_bytes(plan, batch.shard, member) for member in batch.members)


def _matrix_bytes(plan: Plan, shard: int, member: Member) -> int:
    tensor, (rows, columns) = member.tensor, member.view.shape
    stored = [checkpoint.info(tensor.name_in(role)) for role, checkpoint in plan.checkpoints.items()]
    stored.append(plan.shards[shard].header.tensors[tensor.name])
    entry = sum(info.bytes // max(1, info.size) for info in stored)
    rank = None if tensor.rank is None else batched_rank(member.view.shape, tensor.rank)
    together = 0 if rank is None else 4 * rows * columns + batched_memory(member.view.shape, rank)
    return entry * rows * columns + max(together, plan.edit.working_memory(member.view.shape, tensor))


def _dtypes(plan: Plan, shard: int, tensor: TensorPlan) -> tuple[str, ...]:
    read = [checkpoint.info(tensor.name_in(role)).dtype for role, checkpoint in plan.checkpoints.items()]
    return (*read, plan.shards[shard].header.tensors[tensor.name].dtype)
