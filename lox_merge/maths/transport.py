"""Small tensors between the host and a device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on `device`, without waiting for what the device is doing."""
    return values.contiguous().pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def arriving(there: Tensor, here: Tensor) -> Callable[[], None]:
    """Copies `there`, of a device, to `here`, pinned memory of the host. What is returned waits until it has arrived."""
    here.copy_(there, non_blocking=True)
    if there.device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(there.device))
    wait: Callable[[], None] = event.synchronize
    return wait
