"""The section of an inspection of weights."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from lox_merge.diagnostics.matrix_results import AlignedMatrix
from lox_merge.diagnostics.results import Findings, FinetunedGroup
from lox_merge.publish.documents.shape import Interval, read_as
from lox_merge.publish.figures.heat_map import grid_of, heat_map
from lox_merge.publish.figures.inspection import draw_angle_by_layer, draw_energy_kept, draw_overlaps, draw_r_by_layer, draw_ratio_by_layer
from lox_merge.publish.figures.spectra import Spectrum, draw_spectra
from lox_merge.publish.report.inspection_tables import finetuned_table, groups_table, left_out_table, matrices_table
from lox_merge.publish.report.numbers import counted, number
from lox_merge.publish.report.section import Picture, Section, name_of, panel, without_empty

# Pictures are drawn of so many fine-tuned models; the tables have all.
_DRAWN = 6
# More lines than this cannot be told apart.
_LINES = 7


def inspection_sections(document: dict[str, Any], name: str) -> list[Section]:
    """What alignment changed, and what each fine-tuning undid, beside what random subspaces give. Raises RequestError."""
    result = read_as(Findings, document, name)
    base, aligned = result.titles
    group = result.averaged
    ratios = [f"{label} {number(one.ratio.mean)}" for label, one in zip(result.labels, group.finetuned, strict=True)]
    summary = (
        f"From {base} to {aligned}, the leading directions (rank {result.settings.rank}) hold {number(group.aligned.r.mean)} of the change's norm "
        f"(R_align; a random subspace {number(group.aligned.r.expected)})"
        + (f"; R_ft/R_align: {', '.join(ratios[:4])}{' …' if len(ratios) > 4 else ''}." if ratios else ".")
    )
    not_shown = (
        "What lies in the leading directions of alignment is not thereby safety: in the models studied, useful and harmful updates share them alike.",
        "How any of these models behaves: that takes asr and robustness.",
        "The bands are over draws of random subspaces, not over models or training seeds.",
    )
    tables = [groups_table(result), *(finetuned_table(result, place) for place in range(len(result.labels))), matrices_table(result)]
    if result.left_out:
        tables.append(left_out_table(result))
    settings = result.settings
    details = (
        ("base", base),
        ("aligned", aligned),
        ("fine-tuned", ", ".join(result.labels) or "none"),
        ("rank", settings.rank),
        ("side", settings.side),
        ("random subspaces a matrix", f"{settings.draws}, seed {settings.seed}"),
        ("spectra", "all singular values" if settings.full_spectrum else "leading singular values"),
        ("made with", f"{result.tool.get('name')} {result.tool.get('version')}, torch {result.tool.get('torch')}"),
    )
    return [Section("What the weights say", summary, _words(result), not_shown, tuple(_pictures(result)), tuple(tables), details)]


def _words(result: Findings) -> tuple[str, ...]:
    group = result.averaged
    kept = group.aligned.energy_kept[0] if group.aligned.energy_kept else None
    sentences: list[str | None] = [
        f"R_align, mean over {counted(group.aligned.r.matrices, 'matrix', 'matrices')}: {number(group.aligned.r.mean)}; of all energies together "
        f"{number(group.aligned.r.energy)}. {_chance(group.aligned.r.expected, group.aligned.r.band)}",
    ]
    if kept is not None:
        sentences.append(
            f"{100 * kept.fraction:g} % of the directions hold {number(kept.top.mean)} of the energy of alignment's change; as many of them drawn at "
            f"random {number(kept.random_k.mean)}, a random subspace {number(kept.random.mean)}."
        )
    undecided = group.aligned.r.undecided
    if undecided:
        sentences.append(f"Undecided for {counted(undecided, 'matrix', 'matrices')}: too few singular values were computed (--full-spectrum).")
    for label, one in zip(result.labels, group.finetuned, strict=True):
        sentences += _finetuned_words(label, one, reverting=label in result.reverting)
    if len(result.labels) > _DRAWN:
        sentences.append(f"Heat maps and spectra are drawn of the first {_DRAWN} fine-tuned models; the tables have all.")
    return without_empty([*sentences, *result.notes, *result.warnings])


def _finetuned_words(label: str, group: FinetunedGroup, *, reverting: bool) -> list[str]:
    ratio, angle = group.ratio, group.cosines
    found = [f"{label}: R_ft/R_align is {number(ratio.mean)}. {_chance(ratio.expected, ratio.band)} {_verdict(ratio.mean, ratio.band)}".rstrip()]
    if angle.safety_angle is not None:
        size = f"; random directions stay within {number(angle.band[0])} to {number(angle.band[1])}" if angle.band else ""
        found.append(f"{label}: the cosine of its change with −Δ_align, straight back to the base, is {number(angle.safety_angle)}{size}.")
    if reverting:
        found.append(f"{label} walks back along −Δ_align: it undoes alignment almost exactly, whatever it was trained for.")
    return found


def _chance(expected: float | None, band: Interval | None) -> str:
    if expected is None:
        return ""
    return f"A random subspace of the same rank gives {number(expected)}" + (
        f" (95 % of draws {number(band[0])} to {number(band[1])})." if band else "."
    )


def _verdict(value: float | None, band: Interval | None) -> str:
    if value is None or band is None:
        return ""
    if value < band[0]:
        return "Below the band: fine-tuning moved more out of these directions than out of random ones."
    return "Above the band: these directions gained." if value > band[1] else "Within the band: no more than chance."


def _pictures(result: Findings) -> list[Picture]:
    hatched = "Hatched: no such matrix, or undefined."
    band = "Dashed and shaded: random subspaces of the same rank, 95 % of draws."
    grid = grid_of((matrix.full_name, matrix.aligned.r) for matrix in result.matrices)
    wide = len(grid.layers) > 12
    found: list[Picture] = []
    if grid.values:
        caption = f"Share of alignment's change that its leading directions hold. {_by_chance(result)}{hatched}"
        found.append(Picture("r_align", "R_align, layer × module", caption, partial(heat_map, grid, "R_align", low=0.0, high=1.0), wide))
    drawn = list(enumerate(result.labels))[:_DRAWN]
    for place, label in drawn:
        ratios = grid_of((matrix.full_name, matrix.finetuned[place].ratio) for matrix in result.matrices)
        if ratios.values:
            low, high = math.floor(10 * min(ratios.values.values())) / 10, max(1.0, *ratios.values.values())
            caption = f"Below 1, fine-tuning moved the change out of alignment's leading directions. {hatched}"
            drawing = partial(heat_map, ratios, "R_ft / R_align", low=low, high=high)
            found.append(Picture(name_of("ratio", label), f"R_ft/R_align, layer × module: {label}", caption, drawing, wide))
    if result.layers:
        found.append(panel("r_by_layer", "R against layer", f"Mean over a layer's matrices. {band}", draw_r_by_layer, result))
        if result.labels:
            caption = f"Mean over a layer's matrices. {band} The band is that of {result.labels[0]}."
            found.append(panel("ratio_by_layer", "R_ft/R_align against layer", caption, draw_ratio_by_layer, result))
            caption = "1 walks straight back to the base model, 0 is unrelated. Shaded: 95 % of random directions."
            found.append(panel("safety_angle_by_layer", "Cosine of fine-tuning with −Δ_align against layer", caption, draw_angle_by_layer, result))
    found += _spectra_and_energy(result, drawn)
    if result.labels:
        caption = "How far subspaces that hold the same share of energy coincide; 1: the same subspace. Thin dashes: random subspaces."
        found.append(panel("mso", "Subspace overlap (MSO) against energy", caption, draw_overlaps, result))
    return found


def _by_chance(result: Findings) -> str:
    expected = [matrix.aligned.r_expected for matrix in result.matrices if matrix.aligned.r_expected is not None]
    return f"A random subspace of the same rank holds {number(min(expected), '.2f')} to {number(max(expected), '.2f')}. " if expected else ""


def _spectra_and_energy(result: Findings, drawn: list[tuple[int, str]]) -> list[Picture]:
    found = []
    changes: list[tuple[str, str, Any]] = [("aligned", "alignment", lambda part: part.aligned)]
    changes += [(label, label, lambda part, place=place: part.finetuned[place]) for place, label in drawn]
    for name, title, change in changes:
        kinds = _spectra(result, change)
        if kinds:
            edges = [edge for matrix in result.matrices if (edge := change(matrix).noise_edge) is not None]
            caption = "Median over the matrices of a kind, shaded from smallest to largest. Below the grey line lies rounding of the stored weights."
            drawing = (f"Singular values: {title}", caption, draw_spectra, kinds, edges, "singular value")
            found.append(panel(name_of("spectra", name), *drawing))
        group = change(result.averaged)
        if any(one.top.mean is not None for one in group.energy_kept):
            which = "alignment's change" if name == "aligned" else f"the change of {title}"
            caption = f"Share of the energy of {which} in directions of Δ_align. Dashed: chance, with 95 % of draws shaded."
            found.append(panel(name_of("energy_kept", name), f"Energy kept against fraction: {title}", caption, draw_energy_kept, group))
    return found


def _spectra(result: Findings, change: Any) -> dict[str, list[Spectrum]]:
    """By kind, those with the largest changes where there are too many."""
    kinds: dict[str, list[Spectrum]] = {}
    size: dict[str, float] = {}
    for matrix in result.matrices:
        part: AlignedMatrix = change(matrix)
        if part.spectrum.values:
            kinds.setdefault(matrix.kind, []).append(list(zip(part.spectrum.index, part.spectrum.values, strict=False)))
            size[matrix.kind] = max(size.get(matrix.kind, 0.0), part.norm)
    chosen = sorted(sorted(kinds, key=lambda kind: -size[kind])[:_LINES], key=list(kinds).index)
    return {kind: kinds[kind] for kind in chosen}
