"""A model's parameters as they are stored, by the model's own names: from mapped files, or from a copy of a model in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.checkpoint.placement import Group, place
from lox_merge.errors import RequestError
from lox_merge.safety.placement import same_bits

Source = Callable[[str], Tensor]
"""Gives the stored values of a parameter, in any dtype; not to be written to."""


def parameters_of(model: Any) -> dict[str, Tensor]:
    """Every parameter once, by its first name: tied ones share memory, and would be moved twice."""
    found = dict(model.named_parameters())  # leaves out second names of tied parameters
    if offloaded := [name for name, value in found.items() if value.device.type == "meta"]:
        raise RequestError(f"{offloaded[0]} is not in memory (it was offloaded). Use a machine or a device map that holds the whole model.")
    return found


def stored_parameters(model: Any, checkpoint: Checkpoint) -> Source:
    """The checkpoint's tensors as parameters of `model`, read when asked for and converted as transformers does on loading (fused experts).

    Raises RequestError where the checkpoint lacks a parameter of the model or has it in another shape.
    """
    state, wanted = model.state_dict(), parameters_of(model)
    # A tied parameter is stored under one of its names, not always the one that the model calls first.
    first = {value.data_ptr(): name for name, value in wanted.items()}
    home: dict[str, tuple[Group, str]] = {}
    for group in place(model, checkpoint.names)[0]:
        if group.plain:
            shapes = {group.target: tuple(checkpoint.info(group.sources[0][0]).shape)}
        else:  # what a conversion makes is known when it is done
            shapes = {name: tuple(value.shape) for name, value in group.parameters(checkpoint.tensor, model).items()}
        for target, shape in shapes.items():
            name = first.get(state[target].data_ptr()) if target in state else None
            if name is None:
                continue  # a buffer
            if shape != tuple(wanted[name].shape):
                raise RequestError(
                    f"{name} is {list(shape)} in {checkpoint.role} ({checkpoint.title}) and {list(wanted[name].shape)} in the model that is "
                    "moved. Give models of one architecture and vocabulary."
                )
            home[name] = (group, target)
    if missing := sorted(wanted.keys() - home.keys()):
        raise RequestError(
            f"{checkpoint.role} ({checkpoint.title}) has nothing for {len(missing)} parameter(s) of the model, such as {missing[0]}. "
            "Give checkpoints of one architecture."
        )

    def read(name: str) -> Tensor:
        group, target = home[name]
        return group.parameters(checkpoint.tensor, model)[target]

    return read


def copied_parameters(model: Any) -> Source:
    """A copy of a model's parameters as they are now, beside them on their devices: it has no files to restore them from."""
    kept = {name: value.detach().clone() for name, value in parameters_of(model).items()}
    return kept.__getitem__


def live_parameters(label: str, other: Any, model: Any) -> Source:
    """The parameters of another model in memory, not copied. Raises RequestError where they are not those of `model` by name and shape."""
    theirs = parameters_of(other)
    for name, value in parameters_of(model).items():
        if name not in theirs or theirs[name].shape != value.shape:
            there = list(theirs[name].shape) if name in theirs else "nothing"
            raise RequestError(f"{name} is {list(value.shape)} in the model that is moved and {there} in {label}. Give models of one architecture.")

    def read(name: str) -> Tensor:
        return theirs[name].detach()

    return read


def same_values(source: Source, model: Any) -> str | None:
    """The first parameter that is not what `source` holds, rounded to the model's dtype; None where all are."""
    with torch.no_grad():
        for name, value in parameters_of(model).items():
            if not same_bits(value, source(name).to(device=value.device, dtype=value.dtype)):
                return name
    return None
