"""Gradients per example of stacked experts: their forward pass is made again, expert by expert, from the layer's inputs.

transformers runs such a layer in one of several ways (eager, grouped, batched). What goes in and the gradient of what comes out
do not depend on it, so none has to be chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lox_merge.maths.gradients import Contribution, Outer, Whole

if TYPE_CHECKING:
    from lox_merge.diagnostics.curvature.capture import Batch


def expert_contributions(module: Any, arguments: tuple[Any, ...], gradient: Tensor, batch: Batch) -> dict[str, list[Contribution]] | None:
    """Of gate_up_proj (or up_proj), down_proj and their biases. arguments: hidden states, chosen experts, their weights.

    Tokens (b·t) come flattened. None where they are laid out in another way.
    """
    if len(arguments) < 3:
        return None
    hidden, chosen, weights = (value.detach().flatten(0, -2) for value in arguments[:3])
    gradient = gradient.flatten(0, -2)
    if not len(hidden) == len(chosen) == len(gradient) == batch.mask.numel():
        return None
    first = "gate_up_proj" if module.has_gate else "up_proj"
    found: dict[str, list[Contribution]] = {first: [], "down_proj": []}
    owners = torch.arange(len(batch.owners), device=hidden.device).repeat_interleave(batch.mask.shape[1])
    biases = {leaf: _bias_sums(module, leaf, len(batch.owners)) for leaf in (first, "down_proj")} if module.has_bias else {}
    for expert in range(module.num_experts):
        tokens, places = torch.where((chosen == expert) & batch.mask.flatten()[:, None])
        if not len(tokens):
            continue
        inputs = hidden[tokens]
        with torch.no_grad():
            before = _linear(module, first, expert, inputs)
        with torch.enable_grad():
            before.requires_grad_()
            between = module._apply_gate(before) if module.has_gate else module.act_fn(before)
        after = gradient[tokens] * weights[tokens, places, None]
        matrix = module.down_proj[expert].detach()
        (inner,) = torch.autograd.grad(between, before, (after.to(matrix.dtype) @ (matrix.T if module.is_transposed else matrix)).to(between.dtype))
        rows = batch.owners[owners[tokens]]
        found[first].append(Outer(inputs, inner, rows, expert, module.is_transposed))
        found["down_proj"].append(Outer(between.detach(), after, rows, expert, module.is_transposed))
        for leaf, values in ((first, inner), ("down_proj", after)) if module.has_bias else ():
            biases[leaf][:, expert].index_add_(0, owners[tokens], values.to(biases[leaf].dtype))
    found |= {f"{leaf}_bias": [Whole(values.flatten(1)[:, :, None], batch.owners)] for leaf, values in biases.items()}
    return found


def _linear(module: Any, leaf: str, expert: int, inputs: Tensor) -> Tensor:
    matrix = getattr(module, leaf)[expert].detach()
    out: Tensor = inputs.to(matrix.dtype) @ (matrix if module.is_transposed else matrix.T)
    return out + getattr(module, f"{leaf}_bias")[expert].detach() if module.has_bias else out


def _bias_sums(module: Any, leaf: str, examples: int) -> Tensor:
    bias = getattr(module, f"{leaf}_bias")
    return torch.zeros(examples, *bias.shape, dtype=torch.promote_types(bias.dtype, torch.float32), device=bias.device)
