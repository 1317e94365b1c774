"""⟨g_i, D⟩ of every completion's gradient with any number of directions in weight space: one forward and one backward pass in all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lox_merge.diagnostics.curvature.gram import FisherGram
from lox_merge.diagnostics.curvature.walk import Example, walk
from lox_merge.errors import RequestError
from lox_merge.maths.gradients import Contribution, inner_products
from lox_merge.maths.precision import full_precision_matmul
from lox_merge.safety.progress import ProgressFactory, no_progress

# Differences of weights, or gradients, by parameter name; parameters that are absent do not differ.
Direction = Mapping[str, Tensor]


def products_with(
    model: Any,
    examples: Sequence[Example],
    gram: FisherGram,
    directions: Sequence[Direction],
    *,
    batch_size: int | None = None,
    progress: ProgressFactory = no_progress,
) -> dict[str, Tensor]:
    """(len(directions), n) float64 on the CPU by parameter name, of the parameters that `gram` holds.

    model, examples: those of `gram`, at the same weights. Directions may lie on any device; they are brought over once.
    Raises RequestError for a direction of another shape, or one that is not finite.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for direction in directions:
        for name in gram.names:
            if name in direction and direction[name].shape != shapes[name]:
                there = list(direction[name].shape)
                raise RequestError(f"{name} differs in shape: {there}, where the model has {list(shapes[name])}. Give a model of one architecture.")
            if name in direction and not bool(torch.isfinite(direction[name]).all()):
                raise RequestError(f"{name} of a weight difference holds NaN or Inf. One of the models is damaged.")
    devices = {name: parameter.device for name, parameter in model.named_parameters()}
    here = {name: [direction[name].to(devices[name]) if name in direction else None for direction in directions] for name in gram.names}
    found = {name: torch.zeros(len(directions), len(examples), dtype=torch.float64, device=devices[name]) for name in gram.names}

    def emit(name: str, contribution: Contribution) -> None:
        for place, direction in enumerate(here[name]):
            if direction is not None:
                found[name][place] += inner_products(contribution, direction, len(examples))

    wanted = {name for name, values in here.items() if any(value is not None for value in values)}
    if wanted and directions:
        with full_precision_matmul(model.device):
            walk(model, gram.sites, wanted, examples, emit, reduction=gram.reduction, batch_size=batch_size, progress=progress, what="inner products")
    return {name: values.cpu() for name, values in found.items()}
