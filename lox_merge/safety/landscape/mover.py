"""One model in memory, moved in place to θ + Σ c·d for any coordinates, and back bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lox_merge.errors import RequestError
from lox_merge.safety.batches import free_memory
from lox_merge.safety.landscape.anchors import Source, parameters_of, same_values
from lox_merge.safety.landscape.directions import Direction, RandomDirection, keep

# Random directions are kept if they take at most this share of the free memory: drawing them anew takes longer than moving.
_SHARE_OF_FREE_MEMORY = 0.4
# Entries moved at a time on a CPU: their float32 sums stay in a core's cache.
_PIECE = 2**18


class Mover:
    """Sets the parameters of `model` to θ + Σ c·d. Used as a context it restores θ on leaving, whatever happened.

    anchor: θ as stored. Every point is made anew from it, summed in float32 and rounded once to the model's dtype: it does not depend on the
    points before. Nothing here writes to a disk: far from θ, and towards a base model, safety is taken away. Raises RequestError where
    the model does not hold θ.
    """

    def __init__(self, model: Any, anchor: Source) -> None:
        self.model, self._anchor = model, anchor
        self.parameters = parameters_of(model)
        self._directions: tuple[Direction, ...] = ()
        different = same_values(anchor, model)
        if different is not None:
            raise RequestError(f"{different} of the loaded model is not what its checkpoint holds. Load the checkpoint itself, unquantised.")

    def __enter__(self) -> Mover:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._directions = ()
        self.restore()

    def use(self, directions: Sequence[Direction]) -> bool:
        """The directions of the next points. Returns whether random ones among them are kept in memory (else they are drawn at every point)."""
        self._directions = ()  # the last ones go first
        size = sum(value.numel() * value.element_size() for value in self.parameters.values())
        fresh = sum(isinstance(direction, RandomDirection) for direction in directions)
        kept = fresh * size <= _SHARE_OF_FREE_MEMORY * free_memory(next(iter(self.parameters.values())).device)
        self._directions = tuple(
            keep(direction, self.parameters) if kept and isinstance(direction, RandomDirection) else direction for direction in directions
        )
        return kept

    @torch.no_grad()
    def move(self, place: Sequence[float]) -> None:
        """θ + Σ place[i] · d[i]. All zero gives θ itself."""
        wanted = [(direction, factor) for direction, factor in zip(self._directions, place, strict=True) if factor]
        for name, parameter in self.parameters.items():
            parts = [(tensor, factor * own) for direction, factor in wanted for tensor, own in direction.parts(name, parameter)]
            parts = [(tensor, factor) for tensor, factor in parts if factor]
            if parts:
                _write(self._anchor(name), parts, parameter)
            else:
                parameter.copy_(self._anchor(name))

    @torch.no_grad()
    def restore(self) -> None:
        """θ again, bit for bit."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self._anchor(name))


def _write(stored: Tensor, parts: Sequence[tuple[Tensor, float]], out: Tensor) -> None:
    """out = stored + Σ factor · tensor, in float32 (float64 of float64), rounded once."""
    wide = torch.promote_types(torch.float32, stored.dtype)
    whole = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    target = whole.view(-1)
    flat = [(tensor.reshape(-1), factor) for tensor, factor in parts]
    values, step = stored.reshape(-1), _PIECE if out.device.type == "cpu" else target.numel()
    for start in range(0, target.numel(), max(1, step)):
        piece = slice(start, start + step)
        total = values[piece].to(device=out.device, dtype=wide, copy=True)
        for tensor, factor in flat:
            total.add_(tensor[piece].to(device=out.device, dtype=wide), alpha=factor)
        target[piece] = total
    if whole is not out:
        out.copy_(whole)
