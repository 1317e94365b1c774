"""The section of a hardened model."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from lox_merge.publish.documents.hardening import Hardening, Matrix
from lox_merge.publish.documents.shape import read_as
from lox_merge.publish.figures.by_layer import draw_by_layer
from lox_merge.publish.figures.heat_map import grid_of, heat_map, place_of
from lox_merge.publish.figures.spectra import Spectrum, draw_spectra
from lox_merge.publish.report.numbers import between, counted, number
from lox_merge.publish.report.section import Cell, Head, Picture, Section, Table, count, figure, heads, panel, without_empty, word, words_head

# More lines than this cannot be told apart.
_LINES = 7
# A gain below this lost a part of the edit to rounding that is worth a word.
_WANTED_GAIN = 0.95


def hardening_sections(document: dict[str, Any], name: str) -> list[Section]:
    """What was edited, how much of each delta it holds, how well it is known and written. Raises RequestError."""
    result = read_as(Hardening, document, name)
    base, aligned = result.titles
    recipe, found = result.job.recipe, result.summary
    edit = f"{recipe.alpha:g} · Proj_{recipe.rank}" if recipe.rank != "full" else f"{recipe.alpha:g} · "
    summary = (
        f"{aligned} was hardened: {counted(found.edited_tensors, 'tensor')} ({counted(found.edited_matrices, 'matrix', 'matrices')}) became "
        f"aligned + {edit}(aligned − base), with {base} as base."
    )
    tool = result.job.tool
    details = (
        ("base", base),
        ("aligned", aligned),
        ("rank", recipe.rank),
        ("alpha", f"{recipe.alpha:g}"),
        ("rounding", recipe.rounding),
        ("written as", recipe.dtype or "aligned's dtypes"),
        ("made with", f"{tool.get('name')} {tool.get('version')}, torch {tool.get('torch')}, {result.job.device}"),
    )
    not_shown = (
        "How the model behaves, before or after fine-tuning: that takes asr and robustness.",
        "That the leading directions are about safety: compare with edits of equal norm (robustness --controls).",
    )
    return [Section("Hardening", summary, _words(result), not_shown, _pictures(result), (_table(result), *_copied(result)), details)]


def _words(result: Hardening) -> tuple[str, ...]:
    found, matrices = result.summary, [matrix for _, _, matrix in result.matrices]
    expected = [value for matrix in matrices if (value := _expected(matrix)) is not None]
    by_chance = f" A random subspace of the same rank would hold {between(expected, '.2f')}." if expected else ""
    gain, worst = found.realised_gain, found.smallest_gain
    lost = gain is not None and gain < _WANTED_GAIN
    return without_empty(
        (
            f"On average the extrapolated directions hold {number(found.mean_r_align)} of the norm of a delta (R_align; energy-weighted "
            f"{number(found.energy_r_align)}), with a mean rank of {number(found.mean_rank, '.3g')}.{by_chance}",
            f"Of the intended edit {number(gain)} was written (gain; 1 is all of it; the worst is {number(worst)}, {found.smallest_gain_tensor})."
            + (" Rounding to the output's dtype took the rest: --rounding feedback mends it." if lost else ""),
            f"The subspaces are known to a sine of at most {number(found.largest_angle_bound, '.1e')} ({found.largest_angle_tensor})."
            if found.largest_angle_tensor
            else None,
            f"{found.ambiguous_matrices} of {found.edited_matrices} subspaces are ambiguous: the data do not determine their span."
            if found.ambiguous_matrices
            else None,
            f"{counted(found.zero_deltas, 'delta')} of zero {'was' if found.zero_deltas == 1 else 'were'} copied." if found.zero_deltas else None,
            *result.warnings,
        )
    )


def _expected(matrix: Matrix) -> float | None:
    """√(k/d_out), R of a Haar-random subspace of the same rank; None for the whole delta."""
    return math.sqrt(min(1.0, matrix.rank / matrix.shape[0])) if isinstance(matrix.rank, int) else None


def _pictures(result: Hardening) -> tuple[Picture, ...]:
    grid = grid_of((name, matrix.r_align) for name, _, matrix in result.matrices)
    gains = grid_of((name, matrix.realised.gain if matrix.realised else None) for name, _, matrix in result.matrices)
    random = grid_of((name, _expected(matrix)) for name, _, matrix in result.matrices)
    outside = [name for name, _, _ in result.matrices if place_of(name) is None]
    where = "Hatched: no such matrix, or undefined." + (
        f" Outside the layers, and in the table alone: {counted(len(outside), 'matrix', 'matrices')}." if outside else ""
    )
    wide = len(grid.layers) > 12
    found: list[Picture] = []
    if grid.values:
        caption = f"Share of each delta's norm that the extrapolated directions hold. {where}"
        found.append(Picture("r_align", "R_align, layer × module", caption, partial(heat_map, grid, "R_align", low=0.0, high=1.0), wide))
        caption = "The same by layer. Shaded: what a random subspace of the same rank would hold, √(k/d), over the modules."
        if len(grid.modules) <= _LINES:
            found.append(panel("r_align_by_layer", "R_align against layer, and chance", caption, draw_by_layer, grid, random, "R_align"))
    if gains.values:
        caption = f"Share of the intended edit that rounding to the output's dtype left; 1 is all of it. {where}"
        low = min(0.0, *gains.values.values())
        found.append(Picture("realised_gain", "Realised gain, layer × module", caption, partial(heat_map, gains, "gain", low=low, high=1.0), wide))
    kinds = _spectra(result)
    if kinds:
        caption = (
            "Singular values of the deltas that were extrapolated, and last the first one that was not: median over layers, shaded from smallest "
            "to largest. A drop after the last used index means that the rank is a natural one; a flat end, that it is not."
        )
        found.append(panel("singular_values", "Leading singular values of the deltas", caption, draw_spectra, kinds))
    return tuple(found)


def _spectra(result: Hardening) -> dict[str, list[Spectrum]]:
    """By module, those with the largest deltas where there are too many."""
    kinds: dict[str, list[Spectrum]] = {}
    size: dict[str, float] = {}
    for name, _, matrix in result.matrices:
        place = place_of(name)
        kind = place[2] if place else name.removesuffix(".weight")
        if matrix.singular_values:
            after = matrix.certificate.next_singular_value if matrix.certificate else None
            values = [*matrix.singular_values, *([after] if after is not None else [])]
            kinds.setdefault(kind, []).append(list(enumerate(values, 1)))
            size[kind] = max(size.get(kind, 0.0), matrix.delta_norm)
    chosen = sorted(sorted(kinds, key=lambda kind: -size[kind])[:_LINES], key=list(kinds).index)
    return {kind: kinds[kind] for kind in chosen}


def _table(result: Hardening) -> Table:
    columns = heads(
        "matrix",
        words_head("shape"),
        "rank",
        "alpha",
        Head("R_align", note="share of the delta's norm that the extrapolated directions hold"),
        Head("by chance", note="R_align of a random subspace of the same rank, √(k/d)"),
        Head("norm", note="‖Δ‖_F, in the units of the weights"),
        Head("σ₁", note="largest singular value of the delta"),
        Head("gain", note="share of the intended edit that was written"),
        Head("cosine", note="between intended and written edit"),
        Head("angle", note="bound on the sine of the angle between computed and true subspace"),
    )
    ordered = sorted(result.matrices, key=lambda found: math.inf if found[2].r_align is None else -found[2].r_align)
    return Table("Edited matrices, the largest R_align first", columns, tuple(_row(*found) for found in ordered), folded=True)


def _row(name: str, alpha: float | None, matrix: Matrix) -> tuple[Cell, ...]:
    realised, certificate = matrix.realised, matrix.certificate
    return (
        word(name),
        word("×".join(map(str, matrix.shape))),
        count(matrix.rank) if isinstance(matrix.rank, int) else word("full"),
        figure(alpha, "g"),
        figure(matrix.r_align),
        figure(_expected(matrix)) if isinstance(matrix.rank, int) else Cell("–"),
        figure(matrix.delta_norm, ".4g"),
        figure(matrix.singular_values[0], ".4g") if matrix.singular_values else Cell("–"),
        figure(realised.gain if realised else None),
        figure(realised.cosine if realised else None),
        figure(certificate.angle_bound, ".1e") if certificate else Cell("–"),
    )


def _copied(result: Hardening) -> tuple[Table, ...]:
    reasons: dict[str, int] = {}
    for tensor in result.tensors:
        if tensor.action == "copied":
            reasons[tensor.reason or "no reason given"] = reasons.get(tensor.reason or "no reason given", 0) + 1
    rows = tuple((word(reason), count(how_many)) for reason, how_many in reasons.items())
    return (Table("Copied from aligned", heads("why", "tensors"), rows),) if rows else ()
