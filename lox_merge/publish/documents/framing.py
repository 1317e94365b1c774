"""What `lox-merge framing --json` writes."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from lox_merge.publish.documents.shape import Interval, Shape


class Mean(Shape):
    """A mean over n pairs and its bootstrap 95 % interval; None where undefined."""

    mean: float | None
    interval: Interval | None
    n: int


class PairCosines(Shape):
    """One completion under both framings; the fields are those of diagnostics.framing.results.PairCosines."""

    rows: tuple[int, int]
    tokens: int
    excluded: int
    mean_losses: tuple[float, float]
    loss: float | None
    centred: float | None
    shuffled: float | None
    gradient: float | None


class ModelCosines(Shape):
    """One model; the fields are those of diagnostics.framing.results.ModelCosines."""

    model: str
    loss: Mean
    centred: Mean
    shuffled: Mean
    other_loss: Mean
    other_centred: Mean
    gradient: Mean
    mean_gradient: float | None
    same_framing: Mean
    other_completion: Mean
    weights: tuple[str, ...]
    entries: int
    band: float
    pairs: tuple[PairCosines, ...] = Field(min_length=1)


class Data(Shape):
    """A data set of conversations."""

    name: str
    source: str
    sha256: str
    examples: int


class Settings(Shape):
    """matching: how rows were paired. module: pattern of the weights, None for the last layer's attention."""

    matching: str
    module: str | None
    seed: int


class Framing(Shape):
    """Models on the same pairs. data: first and second."""

    models: tuple[ModelCosines, ...] = Field(min_length=1)
    sources: dict[str, dict[str, Any]]
    data: dict[str, Data]
    settings: Settings
    notes: tuple[str, ...]

    @property
    def weights_words(self) -> str:
        return "the last layer's attention" if self.settings.module is None else f"the weights {self.settings.module}"
