"""Which weights the gradients are of: those of the last layer's attention, or the ones that a pattern names."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from lox_merge.errors import RequestError


def chosen_weights(model: Any, pattern: str | None = None) -> dict[str, nn.Parameter]:
    """Weight matrices by name: every projection of the last decoder layer's attention (fused ones too), or all whose name `pattern` finds.

    Biases and norms are left out. Raises RequestError for a pattern that is no regular expression or finds no weight, a model
    without attention that can be found, and weights that are not floating point (8 or 4 bits).
    """
    if pattern is None:
        prefix = _last_attention(model)
        found = {name: value for name, value in model.named_parameters() if name.startswith(prefix + ".") and value.ndim >= 2}
    else:
        try:
            wanted = re.compile(pattern)
        except re.error as error:
            raise RequestError(f"--module {pattern!r} is not a regular expression: {error}.") from error
        found = {name: value for name, value in model.named_parameters() if wanted.search(name) and value.ndim >= 2}
    if not found:
        some = [name for name, value in model.named_parameters() if value.ndim >= 2][-4:]
        raise RequestError(f"--module {pattern!r} finds no weight matrix. Some there are: {', '.join(some)}.")
    if low := [name for name, value in found.items() if not value.is_floating_point() or value.element_size() < 2]:
        raise RequestError(f"{low[0]} is stored in {found[low[0]].dtype}, which has no gradient. Load the unquantised model.")
    return found


def _last_attention(model: Any) -> str:
    """Name of the attention of the last decoder layer that has one; some layers of a hybrid model have none."""
    layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
    for stack, module in reversed(stacks):
        for number, layer in reversed(list(enumerate(module))):
            for name, part in layer.named_children():
                kind = f"{name} {type(part).__name__}".lower()
                # 'post_attention_layernorm' is named so and holds no matrix; cross-attention reads another model.
                if "attn" in kind.replace("attention", "attn") and "cross" not in kind and any(value.ndim >= 2 for value in part.parameters()):
                    return f"{stack}.{number}.{name}"
    raise RequestError(f"no attention was found in the layers of {type(model).__name__}. Name the weights: --module REGEX.")
