"""What `lox-merge harden --json` writes, and the manifest of its output."""

from __future__ import annotations

from typing import Any, Literal

from lox_merge.diagnostics.matrix_results import Certificate
from lox_merge.publish.documents.shape import Shape, source_title


class Realised(Shape):
    """What was written against what was intended: gain ⟨R, T⟩/‖T‖², cosine, and both norms."""

    gain: float | None
    cosine: float | None
    intended_norm: float
    realised_norm: float


class Matrix(Shape):
    """One edited matrix. part: '[3].gate' inside a stacked tensor, else ''."""

    part: str
    shape: tuple[int, int]
    delta_norm: float
    rank: int | Literal["full"] | None
    singular_values: tuple[float, ...] | None
    r_align: float | None
    certificate: Certificate | None
    realised: Realised | None


class Tensor(Shape):
    """One tensor of the output, edited or copied."""

    name: str
    shape: tuple[int, ...]
    action: str
    reason: str | None = None
    alpha: float | None = None
    matrices: tuple[Matrix, ...] = ()


class Summary(Shape):
    """Figures over all edited matrices; None where there is nothing to average."""

    edited_tensors: int
    edited_matrices: int
    copied_tensors: int
    zero_deltas: int
    mean_rank: float | None
    mean_r_align: float | None
    energy_r_align: float | None
    realised_gain: float | None
    smallest_gain: float | None
    smallest_gain_tensor: str | None
    largest_angle_bound: float | None
    largest_angle_tensor: str | None
    ambiguous_matrices: int


class Recipe(Shape):
    """What was asked for."""

    rank: str
    alpha: float
    dtype: str | None
    rounding: str
    seed: int


class Job(Shape):
    """How it was done."""

    tool: dict[str, Any]
    method: str
    device: str
    recipe: Recipe


class Hardening(Shape):
    """A hardened model. output: its folder's own name; in the manifest, its files."""

    output: str | dict[str, Any]
    seconds: float | None = None
    summary: Summary
    job: Job
    sources: dict[str, dict[str, Any]]
    warnings: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    @property
    def titles(self) -> tuple[str, str]:
        """Names of base and aligned."""
        base, aligned = (source_title(self.sources.get(role) or {}) for role in ("base", "aligned"))
        return base, aligned

    @property
    def matrices(self) -> list[tuple[str, float | None, Matrix]]:
        """Every edited matrix with its full name and its alpha, in the order of the file."""
        edited = [(tensor, matrix) for tensor in self.tensors for matrix in tensor.matrices if matrix.realised is not None]
        return [(tensor.name + matrix.part, tensor.alpha, matrix) for tensor, matrix in edited]
