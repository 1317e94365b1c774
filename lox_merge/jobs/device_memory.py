"""How much of a device's memory a run may take, and what it means when that was not enough."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from lox_merge.errors import LoxMergeWarning
from lox_merge.maths.krylov_spaces import forget_spaces
from lox_merge.maths.replayed import no_recording

Result = TypeVar("Result")

# What batches do not count: a context per library, work spaces of products (32 MiB a stream on an H100), pieces of an edit, and the
# holes between tensors.
MARGIN_SHARE = 0.1
MARGIN_BYTES = 2**30

_SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED")


def memory_budget(device: torch.device) -> int:
    """Bytes that batches in flight may take together: of what is free now, this process's cached blocks included, less a margin."""
    if device.type != "cuda":
        return sys.maxsize  # the host's memory is bounded by how much is in flight
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return within_margin(free + cached)


def within_margin(free: int) -> int:
    return max(0, int(free * (1 - MARGIN_SHARE)) - MARGIN_BYTES)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is the device's memory that was not enough: torch's own error, or a library's."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS))


def on_cpu_where_too_large(work: Callable[[torch.device], Result], device: torch.device, what: str, done: str) -> Result:
    """`work` on a device; on the CPU, with a warning, where the device's memory is not enough. what: the matrix. done: 'edited'."""
    try:
        return work(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler: the error's frames hold what did not fit.
    warnings.warn(f"{what} did not fit on {device}; it was {done} on the CPU", LoxMergeWarning, stacklevel=2)
    return work(torch.device("cpu"))


def make_room(error: BaseException, device: torch.device) -> None:
    """Lets go of what an attempt held that ended with `error`: its frames keep their tensors as long as the error lives."""
    if device.type == "cuda":
        with no_recording():
            torch.cuda.synchronize(device)  # what was queued before it failed still uses that memory
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    if device.type == "cuda":
        forget_spaces(device)
        with no_recording():
            torch.cuda.empty_cache()
