"""Directions in which a model's weights are moved, and the slices (lines and planes) that they span."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lox_merge.checkpoint.dtypes import EDITABLE
from lox_merge.errors import RequestError
from lox_merge.jobs.select import is_legacy_buffer
from lox_merge.safety.landscape.held import Weights

# The name of the authors' list of what stays, and LayerNorms that are called otherwise (GPT-2, Falcon).
_NORM = re.compile(r"norm|(^|[._])ln_?\w*[._]|bias$", re.IGNORECASE)


@dataclass(frozen=True)
class Direction:
    """One axis. models: weights of other models' labels: d = Σ w (θ_label - θ₁). seed: of a random direction instead.

    scaled_to: whose norm a random direction has in every tensor: None, that of θ₁; a label, that of θ_label - θ₁ (a control).
    """

    label: str
    models: Mapping[str, float] = field(default_factory=dict)
    seed: int | None = None
    scaled_to: str | None = None

    def to_json(self) -> dict[str, Any]:
        scale = {} if self.seed is None else {"seed": self.seed, "scaled_to": self.scaled_to}
        return {"label": self.label, "models": dict(self.models), **scale}


@dataclass(frozen=True)
class Slice:
    """A line (one direction) or a plane (two) through θ₁ with the coordinates measured along each axis."""

    label: str
    directions: tuple[Direction, ...]
    axes: tuple[tuple[float, ...], ...]

    @property
    def places(self) -> list[tuple[float, ...]]:
        """Coordinates of every point, the last axis fastest."""
        return list(itertools.product(*self.axes))

    @property
    def random(self) -> bool:
        return any(direction.seed is not None for direction in self.directions)

    @property
    def is_random_around_model(self) -> bool:
        """Whether it is what the paper's VISAGE is of: random directions alone, scaled to the model's own norms."""
        return all(direction.seed is not None and direction.scaled_to is None for direction in self.directions)


@dataclass(frozen=True)
class Axis:
    """Coordinates from `low` to `high` in `steps` equal steps (steps + 1 points), both ends included."""

    low: float
    high: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise RequestError(f"the range {self.low:g}:{self.high:g} is not one; give two finite numbers, the smaller first, such as -0.5:0.5.")
        if max(abs(self.low), abs(self.high)) > 100:
            raise RequestError(f"the range {self.low:g}:{self.high:g} goes beyond ±100 times the direction, where no model answers. Narrow it.")
        if not 1 <= self.steps <= 1000:
            raise RequestError(f"{self.steps} steps: give 1 to 1000 (20 gives 21 points).")

    @property
    def coordinates(self) -> tuple[float, ...]:
        # Decimal ends and steps should meet 0 and 1 exactly; sums of a float step would miss them by one unit in the last place.
        raw = [self.low + (self.high - self.low) * step / self.steps for step in range(self.steps + 1)]
        return tuple(round(value, 12) + 0.0 for value in raw)


def random_slices(count: int, axis: Axis, second: Axis | None, seed: int) -> list[Slice]:
    """`count` lines, or planes where a second axis is given, along random directions of seeds that follow one another."""
    slices = []
    for number in range(count):
        seeds = (seed + number,) if second is None else (seed + 2 * number, seed + 2 * number + 1)
        directions = tuple(Direction(f"random {own}", seed=own) for own in seeds)
        slices.append(Slice(" × ".join(one.label for one in directions), directions, _axes(axis, second)))
    return slices


def model_slices(labels: Sequence[str], axis: Axis, second: Axis | None, *, controls: int, seed: int) -> list[Slice]:
    """Through θ₁ and the models `labels`: a line to one; a plane d₁ = θ₂ - θ₁ and d₂ = θ₃ - θ₁ or (θ₃ + θ₄)/2 - θ₁ (LoX's).

    A second axis with one label takes a random direction for it. controls: lines along random directions that have the norm of
    θ₂ - θ₁ in every tensor.
    """
    first = Direction(f"towards {labels[0]}", {labels[0]: 1.0})
    if second is not None:
        if len(labels) == 1:
            other = Direction(f"random {seed}", seed=seed)
        elif len(labels) == 2:
            other = Direction(f"towards {labels[1]}", {labels[1]: 1.0})
        else:
            other = Direction(f"towards the mean of {labels[1]} and {labels[2]}", {labels[1]: 0.5, labels[2]: 0.5})
        return [Slice(f"{first.label} × {other.label}", (first, other), _axes(axis, second))]
    found = [Slice(first.label, (first,), _axes(axis, None))]
    for number in range(controls):
        control = Direction(f"random {seed + number}, norm of {labels[0]}'s difference", seed=seed + number, scaled_to=labels[0])
        found.append(Slice(control.label, (control,), _axes(axis, None)))
    return found


def _axes(axis: Axis, second: Axis | None) -> tuple[tuple[float, ...], ...]:
    return (axis.coordinates,) if second is None else (axis.coordinates, second.coordinates)


def movable(anchor: Weights, name: str) -> bool:
    """Whether a tensor holds weights at all: floating, and not a constant of older versions."""
    info = anchor.info(name)
    return info.dtype in EDITABLE and not is_legacy_buffer(info) and info.size > 0


def stays_by_default(anchor: Weights, name: str) -> bool:
    """Whether random directions leave a tensor alone: norms and biases, that is vectors, and tensors named so.

    The paper excludes norms. Its models have no biases, so that nothing is said of them there.
    """
    return len(anchor.info(name).shape) < 2 or bool(_NORM.search(name))
