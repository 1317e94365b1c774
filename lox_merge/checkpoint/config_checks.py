"""What config.json may not claim: transformers would build it, however large, before it looks at a weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lox_merge.errors import CheckpointFormatError

_LAYERS = re.compile(r"(^|_)(n|num)?_?(\w*_)?layers?$|^depth$|_depth$|^n_layer$")
# Some models use one layer's tensors many times over; none more often than this.
_LAYERS_PER_TENSOR = 20


def check_depth(config: Mapping[str, Any], tensors: int, where: str) -> None:
    """Raises CheckpointFormatError where a number of layers is far above the number of tensors that the checkpoint has."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name, value in part.items():
            if isinstance(value, (int, float)) and _LAYERS.search(name) and not value <= _LAYERS_PER_TENSOR * max(1, tensors):
                raise CheckpointFormatError(
                    f"{where} claims {name} = {str(value)[:20]} for a checkpoint of {tensors:,} tensors. Restore it, or leave this model alone."
                )
