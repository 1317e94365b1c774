"""What `lox-merge framing --json` writes."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from lox_merge.diagnostics.framing.results import Mean, ModelCosines
from lox_merge.publish.documents.shape import Shape

__all__ = ["Data", "Framing", "Mean", "ModelCosines", "Settings"]


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
