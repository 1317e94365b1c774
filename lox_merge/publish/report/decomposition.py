"""The section of a file of factors."""

from __future__ import annotations

from functools import partial
from typing import Any

from lox_merge.publish.documents.decomposition import Decomposition, Factor
from lox_merge.publish.documents.shape import read_as
from lox_merge.publish.figures.heat_map import grid_of, heat_map
from lox_merge.publish.report.numbers import counted, listed
from lox_merge.publish.report.section import Cell, Head, Picture, Section, Table, count, figure, heads, without_empty, word, words_head


def decomposition_sections(document: dict[str, Any], name: str) -> list[Section]:
    """Norms, noise edges and certificates of what was decomposed. Raises RequestError."""
    result = read_as(Decomposition, document, name)
    base, aligned = result.titles
    summary = f"The leading singular triplets of {counted(len(result.matrices), 'matrix', 'matrices')} of {aligned} − {base} are in {result.output}."
    ambiguous = sum(matrix.certificate.ambiguous for matrix in result.matrices)
    zero = sum(matrix.norm == 0 for matrix in result.matrices)
    words = (
        f"{ambiguous} of them are ambiguous at full rank: their last directions are not determined by the data." if ambiguous else None,
        f"{counted(zero, 'delta is', 'deltas are')} zero." if zero else None,
        f"Left out, because they hold NaN or infinity: {listed(result.non_finite)}." if result.non_finite else None,
        *result.warnings,
    )
    grid = grid_of((matrix.name + matrix.part, matrix.norm) for matrix in result.matrices)
    picture = Picture(
        "delta_norm",
        "Norm of the alignment delta, layer × module",
        "Frobenius norm, in the units of the weights. Hatched: no such matrix.",
        partial(heat_map, grid, "‖Δ_align‖", low=0.0),
        wide=len(grid.layers) > 12,
    )
    columns = heads(
        "matrix",
        words_head("shape"),
        Head("triplets"),
        Head("norm", note="‖Δ‖_F, in the units of the weights"),
        Head("noise edge", note="largest singular value that rounding the aligned weights alone would give"),
        Head("angle", note="bound on the sine of the angle between computed and true subspace"),
        words_head("ambiguous"),
    )
    table = Table("Matrices", columns, tuple(map(_row, result.matrices)), folded=True)
    not_shown = ("What these directions do: run search, inspect or robustness.",)
    return [Section("Decomposition", summary, without_empty(words), not_shown, (picture,) if grid.values else (), (table,))]


def _row(matrix: Factor) -> tuple[Cell, ...]:
    return (
        word(matrix.name + matrix.part),
        word("×".join(map(str, matrix.shape))),
        count(matrix.rank),
        figure(matrix.norm, ".4g"),
        figure(matrix.noise_edge, ".2e"),
        figure(matrix.certificate.angle_bound, ".1e"),
        word("yes" if matrix.certificate.ambiguous else "no"),
    )
