"""What a run will take: tensors and bytes are exact, memory is an upper estimate, time comes from a short trial."""

from __future__ import annotations

import time
from typing import Any

import torch

from lox_merge.checkpoint.collector import no_collection
from lox_merge.jobs.batches import outputs_bytes
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.transfers import BUFFER_BYTES, BUFFERS
from lox_merge.jobs.work import IN_FLIGHT_BYTES, available_cores

# Interpreter, torch and its thread pools, measured (benchmarks/harden.py).
PROCESS_BYTES = 350 * 2**20
_TRIAL_SIDE = 1024
# Deltas of real checkpoints decay more slowly than the trial's; the estimate errs on the long side.
_TRIAL_FACTOR = 1.5
# Until worker processes have imported torch.
_START_SECONDS = 3.0
# Reading from cache, hashing and writing of one byte on the machines of benchmarks/harden.py.
_SECONDS_PER_BYTE = 1 / 1.2e9


def _seconds_per_entry(plan: Plan) -> float:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(_TRIAL_SIDE, _TRIAL_SIDE, generator=generator)
    low = torch.randn(_TRIAL_SIDE, 32, generator=generator) @ torch.randn(32, _TRIAL_SIDE, generator=generator)
    aligned = base + 0.001 * low + 0.002 * torch.randn(_TRIAL_SIDE, _TRIAL_SIDE, generator=generator)
    tensor = max(plan.edited, key=lambda tensor: tensor.info.size)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plan.edit.trial(tensor, base, aligned)
        started = time.perf_counter()
        plan.edit.trial(tensor, base, aligned)
        return (time.perf_counter() - started) / base.numel()
    finally:
        torch.set_num_threads(before)


def peak_memory(plan: Plan, device: torch.device | None = None) -> int:
    """Upper estimate of the bytes of the host that one process takes beside mapped files. device: a GPU's own host memory, some hundred
    megabytes that its driver takes, is not counted."""
    costs = [(plan.working_memory(tensor, view), tensor, view) for tensor in plan.edited for view in tensor.views]
    total = sum(cost + 4 * view.shape[0] * view.shape[1] for cost, _, view in costs)
    largest = max((cost + 4 * tensor.info.size for cost, tensor, _ in costs), default=0)
    here = max(min(IN_FLIGHT_BYTES + plan.largest_edit_bytes, total), largest)
    if device is not None and device.type == "cuda":
        # A matrix that the device has no room for is edited here.
        here = max(here, outputs_bytes(plan) + 2 * BUFFERS * BUFFER_BYTES)
    return PROCESS_BYTES + here


@no_collection()
def estimate(plan: Plan, command: str = "harden", workers: int = 1, device: torch.device | None = None) -> dict[str, Any]:
    """Plain values: counts, bytes, peak_memory (bytes of the host, anonymous, of all workers, where they work on `device`), seconds on this CPU.

    Workers divide the cores that one process would use, so that they shorten what is not arithmetic, and start up first.
    """
    matrices = [(tensor, view) for tensor in plan.edited for view in tensor.views]
    entries = sum(view.shape[0] * view.shape[1] for _, view in matrices)
    read, written, each = plan.bytes_read, plan.bytes_written, peak_memory(plan, device)
    moving = _SECONDS_PER_BYTE * (read + written) / workers
    seconds = _TRIAL_FACTOR * entries * _seconds_per_entry(plan) / available_cores() + moving + (_START_SECONDS if workers > 1 else 0)
    return {
        "command": f"{command} --dry-run",
        "edited_tensors": len(plan.edited),
        "edited_matrices": len(matrices),
        "copied_tensors": dict(plan.copied_by_reason()),
        "bytes_read": read,
        "bytes_written": written,
        **({"most_bytes_downloaded_at_once": plan.passing.most_bytes} if plan.passing else {}),
        "workers": workers,
        "peak_memory": each if workers == 1 else PROCESS_BYTES + workers * each,
        "seconds": seconds,
        "recipe": plan.recipe.to_json(),
        "warnings": plan.warnings,
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.info.shape),
                "action": tensor.action,
                "reason": tensor.reason,
                "rank": str(tensor.rank) if tensor.rank else None,
                "alpha": tensor.alpha if tensor.action == "edit" and plan.edit.method == "lox" else None,
                "matrices": len(tensor.views),
            }
            for tensor in plan.tensors
        ],
    }
