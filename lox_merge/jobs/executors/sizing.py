"""How many workers, on which devices, and which shard first."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import psutil
import torch

from lox_merge.errors import LoxMergeWarning, RequestError
from lox_merge.jobs.engine import typical_cost
from lox_merge.jobs.estimate import PROCESS_BYTES, peak_memory
from lox_merge.jobs.plan import Plan, ShardPlan
from lox_merge.jobs.select import TensorPlan
from lox_merge.jobs.work import CrewSize, available_cores
from lox_merge.maths.lanczos import BLOCK
from lox_merge.maths.spectral import DENSE_SHARE, EXACT_SIDE

Workers = int | Literal["auto"]
# Reading, hashing and writing a byte against multiplying a byte of a delta with a block of vectors, on the machines of the benchmarks.
_MOVING = 4.0
# Products with a delta until block Lanczos has its few directions (docs/numerics.md).
_PASSES = 20.0
_CGROUP = Path("/sys/fs/cgroup")


def parse_workers(text: str) -> Workers:
    """The value of --workers. Raises RequestError."""
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise RequestError(f"--workers {text!r} is not a number of workers: give a whole number ≥ 1, or auto.")
    return int(text)


def check_workers(workers: Workers, *, low_disk: bool = False, as_adapter: bool = False) -> None:
    """Raises RequestError for a number that is none, or where shards are not written side by side."""
    if workers != "auto" and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise RequestError(f"workers is {workers!r}; give a whole number ≥ 1, or 'auto'.")
    if workers != 1 and low_disk:
        raise RequestError("--low-disk has one shard's files on disk at a time, so one worker writes: leave --workers out, or --low-disk.")
    if workers != 1 and as_adapter:
        raise RequestError("--as-adapter writes one file, which one worker does: leave --workers out, or --as-adapter.")


def settle_workers(workers: Workers, plan: Plan, device: torch.device, available: int | None = None, *, stacklevel: int = 2) -> int:
    """How many workers the machine carries: at most one a shard, and as many as memory holds (with a LoxMergeWarning where that is fewer
    than asked). 'auto': one for two cores, or one a GPU. available: bytes of memory, default what is free now."""
    most = max(1, len(plan.shards))
    if workers == "auto":
        most = min(most, len(devices_of(device)) if device.type == "cuda" else max(1, available_cores() // 2))
    else:
        most = min(most, workers)
    if most == 1:
        return 1
    each = peak_memory(plan, device)
    free = available_memory() if available is None else available
    fit = max(1, (free - PROCESS_BYTES) // each)
    if workers != "auto" and fit < most:
        warnings.warn(
            f"{most} workers need about {most * each / 1e9:.2g} GB of memory and {free / 1e9:.2g} GB are free: {fit} of them work",
            LoxMergeWarning,
            stacklevel=stacklevel + 1,
        )
    return min(most, fit)


def available_memory() -> int:
    """Bytes that this process and its children can still take: of the machine, and of the container (control groups, version 2)."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    # Pages of files count as used, and go when memory is asked for.
    return free if limit == "max" else min(free, int(limit) - used + int(statistics.get("inactive_file", 0)))


def devices_of(device: torch.device) -> list[torch.device]:
    """The devices that workers take in turn: all GPUs for 'cuda', else the one that was named."""
    if device.type != "cuda" or ":" in str(device):
        return [device]
    return [torch.device("cuda", index) for index in range(max(1, torch.cuda.device_count()))]


def in_turn(devices: Sequence[torch.device], worker: int) -> torch.device:
    """The device of worker number `worker`."""
    return devices[worker % len(devices)]


def crew_of_each(plan: Plan, device: torch.device, workers: int, devices: int = 1) -> CrewSize:
    """The crew of each worker: together they take the machine that a single process would take."""
    return CrewSize.of(device, typical_cost(plan)).shared(workers if devices == 1 else -(-workers // devices))


def longest_first(plan: Plan, todo: Sequence[int]) -> list[int]:
    """Shards by what they take, longest first: taken in this order by whoever is free, they end together (Graham 1969: the last ends
    at most a third later than with the best of all assignments)."""
    return sorted(todo, key=lambda position: (-shard_cost(plan, plan.shards[position]), position))


def shard_cost(plan: Plan, shard: ShardPlan) -> float:
    """What a shard takes, in arbitrary units: bytes × cost of the edit."""
    return sum(_MOVING * shard.header.tensors[tensor.written].bytes + _edit_cost(tensor) for tensor in shard.tensors)


def _edit_cost(tensor: TensorPlan) -> float:
    if tensor.action == "copy" or tensor.rank is None:
        return 0.0
    cost = 0.0
    for view in tensor.views:
        short = min(view.shape)
        k = tensor.rank.from_shape(short)
        dense = short <= EXACT_SIDE or (k is not None and k > DENSE_SHARE * short)
        passes = 1.0 if tensor.rank.kind == "full" else short / BLOCK if dense else _PASSES
        cost += 4 * view.shape[0] * view.shape[1] * passes
    return cost
