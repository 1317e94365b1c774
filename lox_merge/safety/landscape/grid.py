"""Which points are measured: the coordinates of lines and planes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lox_merge.errors import RequestError

MOST_POINTS = 10_000


@dataclass(frozen=True)
class Axis:
    """Evenly spaced coordinates along one direction. steps: how many, both ends among them."""

    low: float
    high: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise RequestError(f"the range {self.low:g}:{self.high:g} is no range; give LOW:HIGH with LOW below HIGH, such as -0.5:0.5.")
        if self.steps < 2:
            raise RequestError(f"{self.steps} step(s) make no line; give 2 or more (an odd number of a symmetric range holds its middle).")

    @property
    def values(self) -> tuple[float, ...]:
        """Rounded to 12 digits, so that 0 is 0 and the same request finds its points again."""
        width = self.high - self.low
        return tuple(float(f"{self.low + width * step / (self.steps - 1):.12g}") + 0.0 for step in range(self.steps))


def places(axes: Sequence[Axis]) -> list[tuple[float, ...]]:
    """Every point of a line or a plane, the last axis fastest. Raises RequestError for more than MOST_POINTS."""
    count = math.prod(axis.steps for axis in axes)
    if count > MOST_POINTS:
        raise RequestError(f"{count:,} points are more than {MOST_POINTS:,}; give fewer steps.")
    found = list(itertools.product(*(axis.values for axis in axes)))
    # A value that only rounding kept from zero is zero.
    return [tuple(0.0 if abs(value) < 1e-12 else value for value in place) for place in found]
