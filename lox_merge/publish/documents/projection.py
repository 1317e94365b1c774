"""What `lox-merge project --json` writes, and the manifest of its output."""

from __future__ import annotations

from typing import Any

from lox_merge.diagnostics.matrix_results import Certificate
from lox_merge.publish.documents.hardening import Realised
from lox_merge.publish.documents.shape import Shape, source_title


class FilteredMatrix(Shape):
    """One matrix. kept: ‖P(Δ_ft)‖/‖Δ_ft‖; kept_random: of a random subspace of the same rank. None where undefined."""

    part: str
    shape: tuple[int, int]
    decision: str | None = None
    finetuned_norm: float | None = None
    rank: int | None = None
    kept: float | None = None
    kept_random: float | None = None
    energy_kept: float | None = None
    cosine: float | None = None
    certificate: Certificate | None = None
    realised: Realised | None = None


class FilteredTensor(Shape):
    """One tensor of the output, edited or copied."""

    name: str
    action: str
    reason: str | None = None
    matrices: tuple[FilteredMatrix, ...] = ()


class Summary(Shape):
    """Figures over all edited matrices; None where there is nothing to average."""

    edited_tensors: int
    edited_matrices: int
    copied_tensors: int
    mean_rank: float | None
    mean_kept: float | None
    mean_kept_random: float | None
    energy_kept: float | None
    energy_kept_random: float | None
    realised_gain: float | None


class Filter(Shape):
    """What was asked for."""

    mode: str
    fraction: float | None
    rank: int | str | None
    basis: str
    side: str


class Job(Shape):
    """How it was done."""

    recipe: Filter


class Projection(Shape):
    """A filtered fine-tuning."""

    summary: Summary
    job: Job
    sources: dict[str, dict[str, Any]]
    warnings: tuple[str, ...]
    tensors: tuple[FilteredTensor, ...]

    def title(self, role: str) -> str:
        return source_title(self.sources.get(role) or {})

    @property
    def matrices(self) -> list[tuple[str, FilteredMatrix]]:
        return [(tensor.name + matrix.part, matrix) for tensor in self.tensors for matrix in tensor.matrices]
