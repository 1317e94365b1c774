"""Where a checkpoint's tensors go in a loaded model: by name, or through transformers' own conversion (fused experts).

transformers 5 renames tensors and fuses experts while it loads. The same rules are applied here to tensors in memory, so
that changed weights reach a model without a file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


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

    def parameters(self, tensor_of: Callable[[str], Tensor], model: Any) -> dict[str, Tensor]:
        """Parameters by name, made from the tensors that `tensor_of` gives for checkpoint names."""
        if self.converter is None:
            return {self.target: tensor_of(self.sources[0][0])}
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.target, name, pattern, tensor_of(name))
        made = converter.convert(self.target, model=model, config=model.config, hf_quantizer=None, loading_info=None)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def place(model: Any, names: Iterable[str]) -> tuple[list[Group], list[str]]:
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
