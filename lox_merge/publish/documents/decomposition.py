"""What `lox-merge decompose --json` writes."""

from __future__ import annotations

from typing import Any

from lox_merge.diagnostics.matrix_results import Certificate
from lox_merge.publish.documents.shape import Shape, source_title


class Factor(Shape):
    """One matrix: ‖Δ‖_F, and the singular value that rounding of the aligned weights alone would give."""

    name: str
    part: str
    shape: tuple[int, int]
    rank: int
    norm: float
    noise_edge: float
    complete: bool
    certificate: Certificate


class Decomposition(Shape):
    """A file of factors."""

    output: str
    job: dict[str, Any]
    sources: dict[str, dict[str, Any]]
    warnings: tuple[str, ...]
    non_finite: tuple[str, ...]
    matrices: tuple[Factor, ...]

    @property
    def titles(self) -> tuple[str, str]:
        """Names of base and aligned."""
        base, aligned = (source_title(self.sources.get(role) or {}) for role in ("base", "aligned"))
        return base, aligned
