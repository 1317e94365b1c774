"""What `lox-merge activations --json` writes."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from lox_merge.publish.documents.shape import Interval, Shape

BASE, ALIGNED = "base", "aligned"


class Measure(Shape):
    """A mean over responses; None where undefined."""

    value: float | None
    interval: Interval | None


class Projection(Shape):
    """One model on one layer's direction. position: 0 is base, 1 aligned."""

    projection: Measure
    position: Measure
    cross_validated: Measure
    off_line: float | None


class LayerDirection(Shape):
    """The alignment direction of one layer."""

    layer: int
    norm: float
    separation: Measure
    cross_validated: Measure
    swapped: float | None
    random: float
    models: dict[str, Projection]


class Residual(Shape):
    """aligned − base at the last layer: shares of ‖R‖² in leading directions."""

    shares: tuple[float, ...]
    centred_shares: tuple[float, ...]
    mean_share: float | None
    mean_cosine: float | None


class Domain(Shape):
    """One file of responses."""

    name: str
    source: str
    sha256: str
    examples: int
    positions: int
    shorter: int
    layers: tuple[LayerDirection, ...] = Field(min_length=1)
    residual: Residual


class Agreement(Shape):
    """|cos| of leading directions of two domains."""

    cosines: tuple[tuple[float, ...], ...]
    permuted_mean: float | None
    permuted_95: float | None
    p_less: float | None
    p_more: float | None
    random_mean: float
    random_95: float
    p_random: float | None

    @property
    def first(self) -> float | None:
        """Of the first directions."""
        return self.cosines[0][0] if self.cosines and self.cosines[0] else None


class DomainPair(Shape):
    """Two domains."""

    first: str
    second: str
    uncentred: Agreement
    centred: Agreement


class Overlap(Shape):
    """MSO at one η, beside random subspaces and halves of each set."""

    eta: float
    counts: tuple[int, int] | None
    mso: float | None
    expected: float | None
    halves: tuple[float | None, float | None]


class SetOverlap(Shape):
    """Two prompt sets at one layer of one model."""

    model: str
    layer: int
    first: str
    second: str
    uncentred: tuple[Overlap, ...]
    centred: tuple[Overlap, ...]


class PromptSet(Shape):
    """Which prompts were read."""

    name: str
    source: str
    sha256: str
    n: int


class Settings(Shape):
    """What of the settings the page needs."""

    tokens: int
    etas: tuple[float, ...] = Field(min_length=1)
    last_layer: int
    vector: str
    permutations: int
    last_layer_is: str
    interval: str
    dtypes: dict[str, str]


class Activations(Shape):
    """A comparison of hidden states. models: base and aligned first."""

    models: tuple[str, ...] = Field(min_length=2)
    sources: dict[str, dict[str, Any]]
    settings: Settings
    domains: tuple[Domain, ...]
    pairs: tuple[DomainPair, ...]
    prompts: tuple[PromptSet, ...]
    overlaps: tuple[SetOverlap, ...]
    notes: tuple[str, ...]

    @model_validator(mode="after")
    def _every_model_everywhere(self) -> Activations:
        for domain in self.domains:
            for layer in domain.layers:
                if missing := set(self.models) - layer.models.keys():
                    raise ValueError(f"domains.{domain.name}.{layer.layer}: nothing of {', '.join(sorted(missing))}")
        return self

    @property
    def others(self) -> tuple[str, ...]:
        """The models beyond base and aligned."""
        return self.models[2:]

    @property
    def set_pairs(self) -> list[tuple[str, str]]:
        """The pairs of prompt sets, in order."""
        return list(dict.fromkeys((overlap.first, overlap.second) for overlap in self.overlaps))
