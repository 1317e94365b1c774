"""What `lox-merge curvature --json` writes."""

from __future__ import annotations

from typing import Any

from lox_merge.publish.documents.shape import Interval, Shape, source_title


class Estimate(Shape):
    """interval: 95 %, over batches; None for one batch."""

    value: float | None
    interval: Interval | None


class Effective(Shape):
    """Effective dimensions of a Fisher matrix; None where it is zero."""

    energy_50: int | None
    energy_90: int | None
    energy_99: int | None
    stable: float | None
    participation: float | None


class Fisher(Shape):
    """Spectrum of one group of parameters. smallest: λ_d. tail: Σ_{j>d} λ_j. eigenvalues: leading ones."""

    parameters: int
    trace: float
    rank: int
    d: int | None
    smallest: float | None
    tail: float | None
    effective: Effective
    eigenvalues: tuple[float, ...]


class LayerFisher(Fisher):
    """Of all parameters of a layer jointly."""

    name: str
    stack: str
    layer: int


class ParameterFisher(Fisher):
    """Of one parameter."""

    name: str
    kind: str
    layer: int | None
    stack: str | None


class Projected(Shape):
    """The paper's estimate and the one without bias, for each seed."""

    plain: tuple[float, ...]
    unbiased: tuple[float, ...]


class ParameterOverlap(Shape):
    """expected: of a random change of the same norm. ratio: score / expected."""

    name: str
    score: float
    expected: float
    ratio: float | None
    squared_norm: float
    projected: Projected | None = None


class FinetunedOverlap(Shape):
    """score: sum over parameters alone; joint: of the whole change, blocks between parameters included."""

    name: str
    source: dict[str, Any]
    left_out: dict[str, str]
    norm: float
    score: float
    expected: float
    ratio: float | None
    joint: float
    joint_expected: float
    joint_ratio: float | None
    predicted_loss: float
    parameters: tuple[ParameterOverlap, ...]


class TimePrediction(Shape):
    """At t = learning rate × steps."""

    time: float
    projection: Estimate
    loss: Estimate
    quadratic_loss: Estimate
    second_order_loss: Estimate


class LayerCoupling(Shape):
    """Of one layer with its own subspace."""

    name: str
    stack: str
    layer: int
    coupling: float | None
    first_order: float | None


class DataCondition(Shape):
    """The Alignment Instability Condition of one data set; None where F = 0."""

    name: str
    source: str
    sha256: str
    examples: int
    examples_used: int
    batches: int
    gradient_norm: Estimate | None
    overlap: Estimate | None
    overlap_share: Estimate | None
    expected_overlap_share: float | None
    first_order: Estimate | None
    coupling: Estimate | None
    expected_coupling: float | None
    control_coupling: float | None
    second_order_from: float | None
    predictions: tuple[TimePrediction, ...]
    layers: tuple[LayerCoupling, ...]
    rank: int | None


class Completions(Shape):
    """The safe completions: how many were used, and their tokens."""

    name: str
    source: str
    sha256: str
    examples: int
    used: int
    tokens: int


class Settings(Shape):
    """Those that words on the page need."""

    reduction: str
    energy: float
    dimension: int | None
    learning_rate: float
    steps: tuple[int, ...]
    times: tuple[float, ...]
    projection: int | None


class Curvature(Shape):
    """A measurement of curvature."""

    model: dict[str, Any]
    completions: Completions
    settings: Settings
    passes: int
    left_out: dict[str, str]
    fisher: Fisher
    layers: tuple[LayerFisher, ...]
    parameters: tuple[ParameterFisher, ...]
    finetuned: tuple[FinetunedOverlap, ...]
    data: tuple[DataCondition, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def title(self) -> str:
        return source_title(self.model.get("source") or {}) if not self.model.get("title") else str(self.model["title"])

    @property
    def ranked(self) -> list[DataCondition]:
        """Data sets, the riskiest first; those without a figure last."""
        return sorted(self.data, key=lambda record: (record.rank is None, record.rank or 0))
