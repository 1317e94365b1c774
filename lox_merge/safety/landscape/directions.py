"""Directions in the space of weights: random ones scaled to the weights, and differences of models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lox_merge.maths.precision import frobenius_norm
from lox_merge.safety.landscape.anchors import Source


class Direction(Protocol):
    """A direction d: what is added to a parameter is a number times its part of d."""

    @property
    def label(self) -> str: ...

    def parts(self, name: str, like: Tensor) -> Sequence[tuple[Tensor, float]]:
        """d on one parameter as a sum of (tensor of its shape, factor); empty where d is zero there. like: the parameter, its dtype and shape."""
        ...


@dataclass(frozen=True)
class RandomDirection:
    """Gaussian, scaled in every matrix to that matrix's Frobenius norm; norms and biases (one dimension) stay (Peng et al. 2024).

    anchor: the weights that give the scale. The numbers depend on seed, place and the parameter's name alone, are drawn on the CPU and rounded
    to the parameter's dtype, so that devices and kept or fresh draws agree. Stacked experts are as many matrices.
    """

    anchor: Source
    seed: int
    number: int
    label: str

    def parts(self, name: str, like: Tensor) -> Sequence[tuple[Tensor, float]]:
        if like.ndim < 2:
            return ()
        digest = hashlib.sha256(f"{self.seed} {self.number} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        drawn = torch.empty(like.shape)
        scale = self.anchor(name)
        for own, weights in zip(drawn.view(-1, *like.shape[-2:]), scale.reshape(-1, *like.shape[-2:]), strict=True):
            own.normal_(generator=generator)
            norm = frobenius_norm(own)
            own.mul_(frobenius_norm(weights) / norm if norm else 0.0)
        return ((drawn.to(device=like.device, dtype=like.dtype), 1.0),)


@dataclass(frozen=True)
class ModelDirection:
    """Σ factor · θ_model over `models`; factors sum to 0, so it is a difference of models. Every parameter moves, norms and biases too."""

    models: tuple[tuple[Source, float], ...]
    label: str

    def parts(self, name: str, like: Tensor) -> Sequence[tuple[Tensor, float]]:
        return [(source(name), factor) for source, factor in self.models]


@dataclass(frozen=True)
class KeptDirection:
    """A direction whose parts were made once and stay in memory."""

    label: str
    kept: Mapping[str, Sequence[tuple[Tensor, float]]]

    def parts(self, name: str, like: Tensor) -> Sequence[tuple[Tensor, float]]:
        return self.kept[name]


def keep(direction: Direction, parameters: Mapping[str, Tensor], advance: Callable[[int], None] = lambda _count: None) -> KeptDirection:
    """All parts of a direction, in memory beside the parameters: as many bytes as they have."""
    kept = {}
    for name, value in parameters.items():
        kept[name] = direction.parts(name, value)
        advance(1)
    return KeptDirection(direction.label, kept)


def coordinates(model: Direction, axes: Sequence[Direction], parameters: Mapping[str, Tensor]) -> tuple[tuple[float, ...], float]:
    """Where θ_model − θ₁ lies: least-squares coordinates on the axes, and the distance that is left over its length, in [0, 1].

    float64 sums, parameter by parameter. Coordinates are NaN where the axes are linearly dependent.
    """
    rows = [*axes, model]
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for name, value in parameters.items():
        flat = [_dense(direction.parts(name, value), value) for direction in rows]
        for i, one in enumerate(flat):
            for j in range(i + 1):
                gram[i, j] += torch.dot(one, flat[j]).cpu()
    gram = gram + gram.tril(-1).T
    inner, product, square = gram[:-1, :-1], gram[:-1, -1], float(gram[-1, -1])
    if float(torch.linalg.cond(inner)) > 1e10:
        return tuple(float("nan") for _ in axes), float("nan")
    found = torch.linalg.solve(inner, product)
    rest = max(0.0, square - float(found @ product))
    return tuple(float(value) for value in found), (rest / square) ** 0.5 if square else 0.0


def _dense(parts: Sequence[tuple[Tensor, float]], like: Tensor) -> Tensor:
    total = torch.zeros(like.numel(), dtype=torch.float64, device=like.device)
    for tensor, factor in parts:
        total.add_(tensor.to(like.device).reshape(-1).double(), alpha=factor)
    return total
