"""Rounding float32 weights to a stored dtype: nearest, stochastic (unbiased), or nearest with feedback (see edits)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Rounding = Literal["nearest", "feedback", "stochastic"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)


def round_nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 `values` of any shape in `dtype`, to nearest even: PyTorch's own conversion."""
    return values.to(dtype)


def round_stochastic(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """float32 `values` in `dtype`, up or down at random so that the mean over draws is the value itself.

    A value between neighbours a < x < b of `dtype` becomes b with probability (x - a)/(b - a). Values beyond the
    largest finite one are left to round-to-nearest. `generator` lives on the device of `values`.
    """
    if dtype == torch.float32:
        return values.clone()
    nearest = values.to(dtype)
    back = nearest.float()
    # The neighbour on the other side of x; x itself representable means both are equal and nothing is random.
    other = torch.nextafter(nearest, torch.where(back < values, torch.inf, -torch.inf).to(dtype))
    distance = (values - back).abs()
    width = (other.float() - back).abs()
    draw = torch.rand(values.shape, generator=generator, device=values.device)
    take_other = (draw * width < distance) & torch.isfinite(other)
    return torch.where(take_other, other, nearest)
