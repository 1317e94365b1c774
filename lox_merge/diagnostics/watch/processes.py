"""What one process found, told to all: a trainer that logs or stops in one process alone would wait for the others for ever."""

from __future__ import annotations

from typing import Any

import torch


def agreed(flags: tuple[bool, bool], args: Any) -> tuple[bool, bool]:
    """The first process's flags, in every process of the training."""
    if args.world_size <= 1 or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return flags
    shared = torch.tensor(flags, dtype=torch.uint8, device=args.device)
    torch.distributed.broadcast(shared, src=0)
    first, second = map(bool, shared.tolist())
    return first, second
