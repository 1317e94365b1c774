"""What `lox-merge landscape --json` writes."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from lox_merge.publish.documents.shape import AttackRate, Interval, Prompts, Shape


class Measured(Shape):
    """One point; the fields are those of safety.landscape.results.PointResult."""

    attack_success: dict[str, AttackRate]
    finished: float | None
    utility: dict[str, float | None]
    undefined: str | None
    change_seconds: float
    evaluation_seconds: float

    def rate(self, judge: str) -> float | None:
        found = self.attack_success.get(judge)
        return None if found is None else found.rate


class Point(Measured):
    """at: its coordinates, one for each direction."""

    at: tuple[float, ...]


class Direction(Shape):
    label: str
    models: dict[str, float]
    seed: int | None = None
    scaled_to: str | None = None


class Mark(Shape):
    """A model's least-squares coordinates, its distance from their span, and that as a share of its distance from the model."""

    label: str
    coordinates: tuple[float, ...]
    distance: float
    off_plane: float | None


class Visage(Shape):
    """VISAGE of one slice; None where no point has an ASR below 100 %."""

    value: float | None
    used: int
    full: int
    undefined: int


class Spread(Shape):
    """VISAGE over random directions; sd and interval are None below two."""

    directions: int
    n: int
    mean: float | None
    low: float | None
    high: float | None
    sd: float | None
    interval: Interval | None


class Slice(Shape):
    """A line or a plane. points: the last axis fastest."""

    label: str
    random: bool
    directions: tuple[Direction, ...] = Field(min_length=1, max_length=2)
    axes: tuple[tuple[float, ...], ...]
    marks: tuple[Mark, ...]
    visage: dict[str, Visage]
    points: tuple[Point, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _whole(self) -> Slice:
        count = 1
        for axis in self.axes:
            count *= len(axis)
        if len(self.axes) != len(self.directions) or count != len(self.points):
            raise ValueError(f"slices: {self.label}: {len(self.points)} points do not fill its {len(self.axes)} axes")
        return self


class Landscape(Shape):
    """ASR and utility around a model and between models."""

    title: str
    prompts: Prompts
    judges: dict[str, dict[str, Any]] = Field(min_length=1)
    seed: int
    moved: dict[str, Any]
    anchor: Measured
    slices: tuple[Slice, ...] = Field(min_length=1)
    visage: dict[str, Spread | None]
    notes: tuple[str, ...]

    @property
    def lines(self) -> list[Slice]:
        return [found for found in self.slices if len(found.axes) == 1]

    @property
    def planes(self) -> list[Slice]:
        return [found for found in self.slices if len(found.axes) == 2]
