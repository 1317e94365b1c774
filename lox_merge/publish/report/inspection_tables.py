"""The tables of an inspection of weights."""

from __future__ import annotations

from lox_merge.diagnostics.matrix_results import AlignedMatrix
from lox_merge.diagnostics.results import Findings, Group, Statistic
from lox_merge.publish.documents.shape import Interval
from lox_merge.publish.report.section import Cell, Head, Table, count, figure, heads, word, words_head

_CHANCE = Head("by chance", note="what random subspaces of the same rank give, and 95 % of draws")


def _ends(band: Interval | None) -> tuple[Cell, Cell]:
    return (figure(None), figure(None)) if band is None else (figure(band[0]), figure(band[1]))


def _statistic(found: Statistic) -> tuple[Cell, ...]:
    return (figure(found.mean), figure(found.energy), figure(found.expected), *_ends(found.band))


def groups_table(result: Findings) -> Table:
    """Alignment's change and every fine-tuning's, for the whole model, its layers and kinds."""
    columns = heads(
        "part",
        words_head("change"),
        "matrices",
        Head("‖Δ‖/‖W‖", note="norm of the change relative to the aligned weights"),
        Head("R", note="R_align or R_ft: share of the change in alignment's leading directions; mean over matrices"),
        Head("R, energy", note="the same of all energies together"),
        _CHANCE,
        "low",
        "high",
        Head("ratio", note="R_ft/R_align, mean over matrices"),
        Head("ratio, chance", note="what random subspaces give for the ratio"),
        Head("cosine", note="with −Δ_align"),
        Head("noise rank", note="directions above rounding noise, mean over matrices"),
        Head("rank 90 %", note="directions that hold 90 % of the energy, mean over matrices"),
        Head("undecided", note="matrices whose spectrum was not computed far enough for R"),
    )
    rows: list[tuple[Cell, ...]] = []
    for group in (result.whole, result.linear, *result.layers, *result.kinds):
        rows.append(_group_row(group, "alignment", None))
        rows += [_group_row(group, label, place) for place, label in enumerate(result.labels)]
    return Table("Whole model, layers, kinds", columns, tuple(rows), folded=len(rows) > 30)


def _group_row(group: Group, change: str, place: int | None) -> tuple[Cell, ...]:
    part = group.aligned if place is None else group.finetuned[place]
    finetuned = None if place is None else group.finetuned[place]
    own = (figure(finetuned.ratio.mean), figure(finetuned.ratio.expected), figure(finetuned.cosines.safety_angle)) if finetuned else (Cell("–"),) * 3
    ranks = (figure(part.noise_floor_rank.mean, ".1f"), figure(part.effective_ranks.energy_90.mean, ".1f"))
    sizes = (count(group.matrices), figure(part.relative_norm, ".2e"))
    return (word(group.name), word(change), *sizes, *_statistic(part.r), *own, *ranks, count(part.r.undecided))


_SPECTRUM = (
    Head("norm", note="‖Δ‖_F, in the units of the weights"),
    Head("‖Δ‖/‖W‖"),
    Head("noise rank", note="directions above rounding noise"),
    Head("50 %", note="directions that hold this share of the energy"),
    "90 %",
    "99 %",
    Head("stable", note="stable rank, ‖Δ‖_F²/σ₁²"),
    Head("participation", note="participation ratio of the squared singular values"),
)


def _spectrum(part: AlignedMatrix) -> tuple[Cell, ...]:
    ranks = part.effective_ranks
    return (
        figure(part.norm, ".4g"),
        figure(part.relative_norm, ".2e"),
        count(part.noise_floor_rank),
        *(figure(rank, "g") for rank in (ranks.energy_50, ranks.energy_90, ranks.energy_99)),
        *(figure(rank, ".1f") for rank in (ranks.stable, ranks.participation)),
    )


def matrices_table(result: Findings) -> Table:
    """Alignment's change, matrix by matrix."""
    columns = heads("matrix", words_head("shape"), "k", "R_align", Head("by chance", note="√(k/d)"), *_SPECTRUM, words_head("undecided"))
    rows = []
    for matrix in result.matrices:
        part = matrix.aligned
        name = (word(matrix.full_name), word("×".join(map(str, matrix.shape))), count(matrix.k))
        rows.append((*name, figure(part.r), figure(part.r_expected), *_spectrum(part), word(part.undecided) if part.undecided else Cell("")))
    return Table("Alignment's change, matrix by matrix", columns, tuple(rows), folded=True)


def finetuned_table(result: Findings, place: int) -> Table:
    """One fine-tuned model's change, matrix by matrix, the lowest ratio first."""
    columns = heads("matrix", "R_ft", Head("ratio", note="R_ft/R_align"), _CHANCE, "low", "high", Head("cosine", note="with −Δ_align"), *_SPECTRUM)
    ordered = sorted(result.matrices, key=lambda matrix: (matrix.finetuned[place].ratio is None, matrix.finetuned[place].ratio or 0.0))
    rows = []
    for matrix in ordered:
        part = matrix.finetuned[place]
        chance = part.ratio_random
        by_chance = (figure(chance.expected if chance else None), *_ends(chance.band if chance else None))
        own = (figure(part.r), figure(part.ratio), *by_chance, figure(part.cosines.safety_angle))
        rows.append((word(matrix.full_name), *own, *_spectrum(part)))
    return Table(f"Change of {result.labels[place]}, the lowest ratio first", columns, tuple(rows), folded=True)


def left_out_table(result: Findings) -> Table:
    """What was not compared, and why."""
    rows = tuple((word(one.name), word(one.reason)) for one in result.left_out)
    return Table("Not compared", heads("tensor", words_head("why")), rows, folded=len(rows) > 10)
