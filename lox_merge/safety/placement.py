"""Where a checkpoint's tensors go in a loaded model: by name, or through transformers' own conversion (fused experts).

transformers 5 renames tensors and fuses experts while it loads. The same rules are applied here to tensors in memory, so
that changed weights reach a model without a file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lox_merge.errors import RequestError

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Group:
    """Checkpoint tensors that become one or more parameters together.

    sources: checkpoint names with the pattern of the conversion that takes them (None: only a name changes). target: the
    parameter, or the first one where a tensor is taken apart.
    """

    target: str
    sources: list[tuple[str, str | None]] = field(default_factory=list)
    converter: Any = None

    @property
    def plain(self) -> bool:
        """Whether the parameter is the stored tensor itself."""
        return self.converter is None

    def parameters(self, tensor_of: Callable[[str], Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """Parameters by name, made from the tensors that `tensor_of` gives for checkpoint names."""
        if self.converter is None:
            return {self.target: tensor_of(self.sources[0][0])}
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.target, name, pattern, tensor_of(name))
        made = converter.convert(self.target, model=model, config=model.config, hf_quantizer=None, loading_info=None)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def place(model: PreTrainedModel, names: Iterable[str]) -> tuple[list[Group], list[str]]:
    """Groups for the checkpoint's tensors, and the names that the model has no use for (as transformers finds on loading)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model) or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    groups: dict[str, Group] = {}
    unused = []
    # The order decides which expert comes first in a stack: numbers count as numbers, as in transformers.
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], base_model_prefix=model.base_model_prefix, meta_state_dict=state)
        if target not in state:
            unused.append(name)
            continue
        group = groups.setdefault(target, Group(target, converter=by_pattern[pattern] if pattern is not None else None))
        group.sources.append((name, pattern))
    return list(groups.values()), unused


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
