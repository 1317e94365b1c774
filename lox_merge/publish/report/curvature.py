"""The section of a measurement of curvature."""

from __future__ import annotations

from functools import partial
from typing import Any

from lox_merge.publish.documents.curvature import Curvature, Fisher
from lox_merge.publish.documents.shape import read_as
from lox_merge.publish.figures.curvature import (
    draw_couplings,
    draw_fisher_spectra,
    draw_layer_spectra,
    draw_overlap_by_layer,
    draw_predictions,
    overlap_grid,
)
from lox_merge.publish.figures.heat_map import heat_map
from lox_merge.publish.report.curvature_tables import data_table, layers_table, overlaps_table, parameters_table
from lox_merge.publish.report.numbers import counted, listed, number
from lox_merge.publish.report.section import Picture, Section, name_of, panel, without_empty

NOT_SHOWN = (
    "What happens to replies: the Fisher matrix is of the log-likelihood of these completions, to second order around these weights.",
    "How Adam, clipping or weight decay move: t is the time of gradient flow, and steps of Adam are longer by far.",
    "Anything across models: a model that is sure of its safe completions has small gradients, and so a small Fisher matrix.",
)
_MAPS = 4


def curvature_sections(document: dict[str, Any], name: str) -> list[Section]:
    """Spectra, overlap scores beside chance, data sets by risk. Raises RequestError."""
    return [curvature_section(read_as(Curvature, document, name))]


def curvature_section(result: Curvature) -> Section:
    """The section of a measurement that is read already."""
    completions = result.completions
    words = (
        f"The empirical Fisher matrix of {counted(completions.used, 'safe completion')} of {completions.source} "
        f"(sha256 {completions.sha256[:12]}) at {result.title}, exact by its Gram matrix; log-likelihoods are "
        f"{result.settings.reduction}s over tokens.",
        _fisher_words(result.fisher),
        _overlap_words(result),
        _data_words(result),
        *(note[:1].upper() + note[1:].rstrip(".") + "." for note in (*result.notes, *result.warnings)),
    )
    projected = None
    if result.settings.projection is not None:
        projected = "That the projected score is the overlap score: its square carries the projection's noise, which the exact one has not."
    details = (
        ("completions", f"{completions.used} of {completions.examples}, {completions.tokens:,} tokens"),
        ("d", "given" if result.settings.dimension is not None else f"fewest eigenvalues with {result.settings.energy:g} of the trace"),
        ("passes over the completions", str(result.passes)),
        ("left out", listed(sorted(result.left_out)) if result.left_out else "nothing"),
    )
    tables = [layers_table(result), parameters_table(result)]
    if result.finetuned:
        tables.insert(0, overlaps_table(result))
    if result.data:
        tables.insert(0, data_table(result))
    return Section(
        "Curvature of safe behaviour",
        _summary(result),
        without_empty(words),
        without_empty((*NOT_SHOWN, projected)),
        _pictures(result),
        tuple(tables),
        details,
    )


def _summary(result: Curvature) -> str:
    fisher = result.fisher
    if fisher.d is None:
        return f"The safe completions leave no gradient in {result.title}: nothing can be said."
    ranked = [data.name for data in result.ranked if data.rank is not None]
    share = f"{fisher.d} of {fisher.parameters:,} directions hold the safe completions' curvature of {result.title}"
    return f"{share}; by coupling {listed(ranked)} bend towards them in this order." if len(ranked) > 1 else f"{share}."


def _fisher_words(fisher: Fisher) -> str | None:
    if fisher.d is None:
        return None
    return (
        f"Over all parameters jointly d = {fisher.d}, λ = {number(fisher.smallest, '.3g')}, {number(fisher.tail, '.3g')} of the trace "
        f"{number(fisher.trace, '.3g')} lies beyond, and the participation ratio is {number(fisher.effective.participation, '.3g')}. "
        f"{counted(fisher.rank, 'completion')} with a gradient of its own bound the rank."
    )


def _overlap_words(result: Curvature) -> str | None:
    known = [f"{model.name}: {number(model.joint_ratio, '.3g')}" for model in result.finetuned]
    return f"Overlap scores over those of random changes of equal norm, all parameters jointly: {listed(known)}." if known else None


def _data_words(result: Curvature) -> str | None:
    known = [
        f"{data.name}: {number(data.overlap_share.value)} where chance gives {number(data.expected_overlap_share)}"
        for data in result.ranked
        if data.overlap_share is not None
    ]
    return f"Share of each data set's gradient inside the subspace: {listed(known)}." if known else None


def _pictures(result: Curvature) -> tuple[Picture, ...]:
    pictures = []
    if result.fisher.d is None:
        return ()
    if any(data.coupling is not None for data in result.data):
        pictures += [
            panel(
                "predicted_loss",
                "Predicted loss of safety against fine-tuning time",
                "Lines: to second order with the first-order overlap, shaded: 95 % over batches. Dashed: γ²t⁴/8, by the coupling alone. "
                "Gradient flow, while t is small.",
                draw_predictions,
                result,
            ),
            panel(
                "couplings", "Coupling of each data set", "Lines are 95 % intervals over batches. Grey: what chance gives.", draw_couplings, result
            ),
        ]
    if result.finetuned:
        caption = "Overlap score of each layer's parameters over that of random changes of the same norms. Dashed: chance."
        pictures.append(panel("overlap_by_layer", "Overlap by layer", caption, draw_overlap_by_layer, result))
    for model in result.finetuned[:_MAPS]:
        pictures.append(
            Picture(
                name_of("overlap", model.name),
                f"Overlap of {model.name} by layer and module",
                "0 is chance: a random change of the same norm in that module.",
                partial(heat_map, overlap_grid(model), "log10(score / random)"),
                wide=len(result.layers) > 12,
            )
        )
    if any(parameter.layer is not None for parameter in result.parameters):
        caption = "Median over layers, shaded from lowest to highest; kinds with the largest trace."
        pictures.append(panel("fisher_spectra", "Fisher spectra by kind of module", caption, draw_fisher_spectra, result))
        caption = "All parameters of a layer jointly, from the first layer (dark) to the last (light)."
        pictures.append(panel("layer_spectra", "Fisher spectra by layer", caption, draw_layer_spectra, result))
    return tuple(pictures)
