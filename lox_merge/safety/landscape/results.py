"""What a landscape found: points with rates and utility, VISAGE of every slice, and its spread over random directions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lox_merge._version import __version__
from lox_merge.maths.landscape import visage
from lox_merge.safety.bootstrap import Interval, bootstrap_interval
from lox_merge.safety.landscape.directions import Slice
from lox_merge.safety.landscape.sources import ModelPlace
from lox_merge.safety.types import AttackSuccess


@dataclass(frozen=True)
class PointResult:
    """One point measured. attack_success: by judge; empty where `undefined` says why nothing could be measured there.

    finished: share of replies that the model ended by itself (a model that babbles does not), None where undefined. utility:
    measures by name, None where undefined there (`utility_undefined` says why). seconds: to set the weights, and to ask and judge.
    """

    attack_success: dict[str, AttackSuccess]
    finished: float | None = None
    utility: dict[str, float | None] = field(default_factory=dict)
    undefined: str | None = None
    utility_undefined: str | None = None
    change_seconds: float = 0.0
    evaluation_seconds: float = 0.0

    def rate(self, judge: str) -> float | None:
        """ASR; None where the point is undefined or the judge decided nothing."""
        found = self.attack_success.get(judge)
        return None if found is None else found.rate

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PointResult:
        rates = {
            judge: AttackSuccess(**{**found, "interval": None if found["interval"] is None else tuple(found["interval"])})
            for judge, found in value["attack_success"].items()
        }
        return cls(**{**value, "attack_success": rates})


@dataclass(frozen=True)
class Visage:
    """VISAGE of one slice and judge: mean of 100 - ASR (%) over `used` points; None without any.

    full: points left out because their ASR is 100 %; undefined: points without a rate.
    """

    value: float | None
    used: int
    full: int
    undefined: int


@dataclass(frozen=True)
class Spread:
    """VISAGE over random directions: `n` of `directions` have one. sd: with n - 1; interval: 95 %, bootstrap over directions.

    sd and interval are None below two directions.
    """

    directions: int
    n: int
    mean: float | None
    low: float | None
    high: float | None
    sd: float | None
    interval: Interval | None


@dataclass(frozen=True)
class SliceResult:
    """points: in the order of `where.places`. marks: where the named models lie on it (None for slices of random directions alone)."""

    where: Slice
    points: tuple[PointResult, ...]
    marks: tuple[ModelPlace, ...] = ()

    def visage(self, judge: str) -> Visage:
        rates = [point.rate(judge) for point in self.points]
        full, undefined = sum(rate == 1 for rate in rates), sum(rate is None for rate in rates)
        return Visage(visage(rates), len(rates) - full - undefined, full, undefined)

    def to_json(self, judges: Sequence[str]) -> dict[str, Any]:
        return {
            "label": self.where.label,
            "random": self.where.random,
            "directions": [direction.to_json() for direction in self.where.directions],
            "axes": [list(axis) for axis in self.where.axes],
            "marks": [asdict(mark) for mark in self.marks],
            "visage": {judge: asdict(self.visage(judge)) for judge in judges},
            "points": [{"at": list(at), **point.to_json()} for at, point in zip(self.where.places, self.points, strict=True)],
        }


@dataclass(frozen=True)
class Landscape:
    """The result of `landscape`. anchor: θ₁ itself, measured. moved: how many tensors random directions move, and how many stay.

    models: identities of the others by label. notes: what the reader must know to read the figures. resumed: points that a file held.
    """

    model: dict[str, Any]
    title: str
    models: dict[str, dict[str, Any]]
    prompts: dict[str, Any]
    judges: dict[str, dict[str, Any]]
    seed: int
    moved: dict[str, Any]
    anchor: PointResult
    slices: tuple[SliceResult, ...]
    notes: tuple[str, ...]
    resumed: int = 0

    def spread(self, judge: str) -> Spread | None:
        """Over the slices of random directions with the model's own norms (no controls, no models); None where there are none."""
        own = [found for found in self.slices if found.where.is_random_around_model]
        if not own:
            return None
        values = [value for found in own if (value := found.visage(judge).value) is not None]
        return Spread(
            directions=len(own),
            n=len(values),
            mean=statistics.fmean(values) if values else None,
            low=min(values, default=None),
            high=max(values, default=None),
            sd=statistics.stdev(values) if len(values) > 1 else None,
            interval=bootstrap_interval(values, seed=self.seed),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is undefined is null. Holds no replies, no weights and no path of this machine."""
        spreads = {judge: self.spread(judge) for judge in self.judges}
        return {
            "lox_merge": __version__,
            "command": "landscape",
            "title": self.title,
            "model": self.model,
            "models": self.models,
            "prompts": self.prompts,
            "judges": self.judges,
            "seed": self.seed,
            "moved": self.moved,
            "anchor": self.anchor.to_json(),
            "slices": [found.to_json(list(self.judges)) for found in self.slices],
            "visage": {judge: None if found is None else asdict(found) for judge, found in spreads.items()},
            "interval": "Wilson 95 % for a rate, over prompts; bootstrap 95 % for the mean VISAGE, over random directions",
            "notes": list(self.notes),
            "resumed": self.resumed,
        }
