"""The section of a filtered fine-tuning."""

from __future__ import annotations

from functools import partial
from typing import Any

from lox_merge.publish.documents.projection import Projection
from lox_merge.publish.documents.shape import read_as
from lox_merge.publish.figures.heat_map import grid_of, heat_map
from lox_merge.publish.report.numbers import counted, number
from lox_merge.publish.report.section import Head, Picture, Section, Table, count, figure, heads, word, words_head


def projection_sections(document: dict[str, Any], name: str) -> list[Section]:
    """How much of the fine-tuning update lies in the subspace, beside a random one. Raises RequestError."""
    result = read_as(Projection, document, name)
    found, recipe = result.summary, result.job.recipe
    size = f"fraction {recipe.fraction:g}" if recipe.fraction is not None else f"rank {recipe.rank}"
    done = ("the part", "taken out of") if recipe.mode == "orthogonal" else ("only the part", "kept in")
    summary = (
        f"Of {result.title('finetuned')}'s update, {done[0]} in the subspace of {result.title('aligned')} "
        f"({recipe.basis}, {size}, {recipe.side} side) was {done[1]} {counted(found.edited_tensors, 'tensor')}."
    )
    words = (
        f"On average the subspace holds {number(found.mean_kept)} of the norm of an update; a random one of the same rank "
        f"{number(found.mean_kept_random)}.",
        f"Of the energy of all updates together it holds {number(found.energy_kept)}; a random one {number(found.energy_kept_random)}.",
        f"Of the intended edit {number(found.realised_gain)} was written (gain; 1 is all of it).",
        *result.warnings,
    )
    not_shown = (
        "That this takes out harm: the paper behind it finds that harm and usefulness shrink together, and that random subspaces do about as well.",
        "How the model behaves: measure ASR and utility, and compare with --basis random.",
    )
    grid = grid_of((name, matrix.kept) for name, matrix in result.matrices)
    caption = "Share of each update's norm that lies in the subspace. Hatched: no such matrix, or undefined."
    drawing = partial(heat_map, grid, "‖P(Δ_ft)‖ / ‖Δ_ft‖", low=0.0, high=1.0)
    pictures = (Picture("update_kept", "Update inside the subspace, layer × module", caption, drawing, wide=len(grid.layers) > 12),)
    return [Section("Projection filter", summary, words, not_shown, pictures if grid.values else (), (_table(result),))]


def _table(result: Projection) -> Table:
    columns = heads(
        "matrix",
        words_head("shape"),
        words_head("decision"),
        "rank",
        Head("norm", note="‖Δ_ft‖_F, in the units of the weights"),
        Head("in subspace", note="‖P(Δ_ft)‖/‖Δ_ft‖"),
        Head("by chance", note="the same of a random subspace of the same rank"),
        Head("energy", note="share of ‖Δ_ft‖² in the subspace"),
        Head("gain", note="share of the intended edit that was written"),
    )
    rows = tuple(
        (
            word(name),
            word("×".join(map(str, matrix.shape))),
            word(matrix.decision or ""),
            count(matrix.rank),
            figure(matrix.finetuned_norm, ".4g"),
            *map(figure, (matrix.kept, matrix.kept_random, matrix.energy_kept)),
            figure(matrix.realised.gain if matrix.realised else None),
        )
        for name, matrix in result.matrices
    )
    return Table("Filtered matrices", columns, rows, folded=True)
