"""Whether a loaded model holds exactly what its checkpoint does, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lox_merge.checkpoint.placement import Group, place
from lox_merge.errors import RequestError

__all__ = ["Group", "check_loaded", "place", "same_bits"]

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_loaded(model: PreTrainedModel, group: Group, tensor_of: Callable[[str], Tensor]) -> None:
    """Raises RequestError when the model's parameters are not the checkpoint's tensors, bit for bit."""
    state = model.state_dict()
    made = group.parameters(tensor_of, model)
    for name, value in made.items():
        there = state.get(name)
        if there is None or there.shape != value.shape:
            shape = "nothing" if there is None else list(there.shape)
            raise RequestError(f"{group.sources[0][0]} of the checkpoint becomes {name} {list(value.shape)}, where the model has {shape}. {_NEXT}")
        if there.device.type == "meta":
            raise RequestError(f"{name} is not in memory (it was offloaded). Use a machine or a device map that holds the whole model.")
        if not same_bits(there, value.to(device=there.device, dtype=there.dtype)):
            raise RequestError(f"{name} of the loaded model is not what the checkpoint holds ({group.sources[0][0]}). {_NEXT}")


_NEXT = "The rank cannot be changed in memory; load the aligned checkpoint itself, unquantised, with this version of transformers."


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equality of two tensors of one dtype and shape bit by bit: NaN equals NaN, and zero is not minus zero."""
    kind = _INTEGER.get(one.element_size())
    if kind is None or not one.dtype.is_floating_point:
        return torch.equal(one, other)
    return torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))
