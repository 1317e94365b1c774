"""Which module's forward pass each parameter acts in, and so how its gradients per example are found; the rest is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

Kind = Literal["linear", "conv1d", "embedding", "experts", "small"]
# Modules of another kind are differentiated once per example; beyond this that is no longer cheap.
_SMALL = 2**22


@dataclass(frozen=True)
class Site:
    """A module whose inputs and output gradients give the gradients of its own parameters.

    parameters: leaf name → the name in the model (of a tied parameter: the first one).
    """

    name: str
    module: Any = field(repr=False)
    kind: Kind
    parameters: Mapping[str, str]


def find_sites(model: Any) -> tuple[list[Site], dict[str, str]]:
    """(sites in the order of the model's modules, reasons by name of each parameter that none can handle)."""
    names = {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}
    sites, left_out = list[Site](), dict[str, str]()
    for path, module in model.named_modules():
        own = {leaf: names[id(parameter)] for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False)}
        if not own:
            continue
        kind, reason = _kind(module)
        if kind is None:
            left_out |= dict.fromkeys(own.values(), reason)
        else:
            sites.append(Site(path, module, kind, own))
    covered = {name for site in sites for name in site.parameters.values()}
    both = covered & set(left_out)  # a tied parameter of which only one use is understood would get half of its gradient
    sites = [site for site in sites if not both & set(site.parameters.values())]
    return sites, left_out


def selected(sites: list[Site], wanted: Callable[[str], bool]) -> list[str]:
    """Names of the parameters that the sites give and `wanted` takes, in the order of the sites, each once."""
    return list(dict.fromkeys(name for site in sites for name in site.parameters.values() if wanted(name)))


def embedding_scale(module: Any) -> float | None:
    """What the module multiplies its rows by (Gemma); None for an embedding that does something else."""
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    scale = getattr(module, "embed_scale", None)
    if scale is None:
        return None
    return float(scale.flatten()[0]) if isinstance(scale, torch.Tensor) else float(scale)


def _kind(module: Any) -> tuple[Kind | None, str]:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return "linear", ""
    if type(module) is Conv1D:
        return "conv1d", ""
    if isinstance(module, nn.Embedding):
        fits = embedding_scale(module) is not None and module.max_norm is None and not module.scale_grad_by_freq
        return ("embedding", "") if fits else (None, f"{type(module).__name__} does more than look rows up")
    if hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "down_proj"):
        return (None, "experts with a norm after each") if getattr(module, "has_post_expert_norm", False) else ("experts", "")
    if any(True for _ in module.children()):
        return None, f"a parameter of {type(module).__name__} itself, outside any layer"
    if sum(parameter.numel() for parameter in module.parameters(recurse=False)) > _SMALL:
        return None, f"{type(module).__name__} is not a linear layer"
    return "small", ""
