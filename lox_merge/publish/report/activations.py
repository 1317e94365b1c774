"""The page's section on hidden states."""

from __future__ import annotations

from typing import Any

from lox_merge.publish.documents.activations import ALIGNED, BASE, Activations, Domain, LayerDirection
from lox_merge.publish.documents.shape import read_as, source_title
from lox_merge.publish.figures.activations import (
    draw_agreement,
    draw_directions,
    draw_overlaps,
    draw_positions,
    draw_separation,
    draw_sweep,
    middle_eta,
)
from lox_merge.publish.report.activations_tables import agreements_table, overlaps_table, positions_table, residuals_table, separations_table
from lox_merge.publish.report.activations_words import NOT_SHOWN
from lox_merge.publish.report.numbers import counted, listed, number
from lox_merge.publish.report.section import Picture, Section, Table, name_of, panel, without_empty

# Heat maps of single directions for so many pairs of domains; the JSON has all.
_MOST_PAIRS = 3


def activations_sections(document: dict[str, Any], name: str) -> list[Section]:
    """Directions, positions, residuals, overlaps. Raises RequestError."""
    result = read_as(Activations, document, name)
    words = (
        *(sentence for domain in result.domains for sentence in _domain_words(result, domain)),
        *_agreement_words(result),
        *_overlap_words(result),
        *result.notes,
    )
    lone = "Only one domain was read, so no harmless responses stand beside it as a control." if len(result.domains) == 1 else None
    return [
        Section(
            "Where the hidden states lie",
            _in_short(result),
            without_empty(words),
            without_empty((lone, *NOT_SHOWN)),
            tuple(_pictures(result)),
            tuple(_tables(result)),
            _details(result),
        )
    ]


def _in_short(result: Activations) -> str:
    if not result.domains:
        return f"Subspaces that {listed([found.name for found in result.prompts])} fill in {listed(result.models)}, layer by layer."
    domain = result.domains[0]
    last = domain.layers[-1]
    if not result.others:
        return (
            f"At layer {last.layer} aligned lies {number(last.cross_validated.value, '.3g')} from base on {domain.name}, on responses that the "
            "direction was not made of."
        )
    found = [f"{name} {_position(last, name)}" for name in result.others]
    return f"At layer {last.layer}, between base (0) and aligned (1) on {domain.name}: {listed(found)}."


def _domain_words(result: Activations, domain: Domain) -> list[str]:
    last = domain.layers[-1]
    if not last.norm:
        return [f"{domain.name}: aligned and base have the same states at layer {last.layer}."]
    inside, outside = last.separation, last.cross_validated
    lines = [
        f"{domain.name} ({counted(domain.examples, 'response')}), layer {last.layer}: aligned is {number(inside.value, '.3g')} beyond base along a "
        f"direction made of the same responses, {_with(outside)} on others; with labels swapped a direction would show "
        f"{number(last.swapped, '.3g')}, a random one {number(last.random, '.3g')}."
    ]
    for name in result.others:
        found = last.models[name]
        lines.append(
            f"{domain.name}, {name}, layer {last.layer}: position {_position(last, name)}; its mean is {number(found.off_line, '.2f')} off the line, "
            "in the distance of base and aligned."
        )
    return lines


def _position(layer: LayerDirection, name: str) -> str:
    return _with(layer.models[name].cross_validated, ".2f")


def _with(measure: Any, form: str = ".3g") -> str:
    ends = measure.interval
    return number(measure.value, form) + (f" ({number(ends[0], form)} to {number(ends[1], form)})" if ends else "")


def _agreement_words(result: Activations) -> list[str]:
    lines = []
    for pair in result.pairs:
        one, other = pair.uncentred, pair.centred
        shuffled = f"; {number(one.permuted_mean, '.2f')} with rows shuffled between them" if one.permuted_mean is not None else ""
        lines.append(
            f"{pair.first} and {pair.second}: |cos| of the first residual directions {number(one.first, '.2f')} (random "
            f"{number(one.random_mean, '.2f')}{shuffled}); without the mean difference {number(other.first, '.2f')}."
        )
    return lines


def _overlap_words(result: Activations) -> list[str]:
    lines = []
    for first, second in result.set_pairs:
        one = [one for one in result.overlaps if (one.model, one.first, one.second) == (ALIGNED, first, second)][-1]
        place = result.settings.etas.index(middle_eta(result))
        point = one.centred[place]
        if point.mso is not None:
            halves = [half for half in point.halves if half is not None]
            inner = f", two halves of one set {listed([number(half, '.2f') for half in halves])}" if halves else ""
            lines.append(
                f"{first} and {second}, aligned, layer {one.layer}, centred, η = {point.eta:g}: MSO {number(point.mso, '.2f')}; random subspaces "
                f"{number(point.expected, '.2f')}{inner}."
            )
    return lines


def _pictures(result: Activations) -> list[Picture]:
    found: list[Picture] = []
    for domain in result.domains:
        if result.others:
            caption = "On responses that the direction was not made of; whiskers: 95 % bootstrap intervals over responses. No mark: undefined."
            found.append(panel(name_of("position", domain.name), f"Between base and aligned: {domain.name}", caption, draw_positions, result, domain))
        caption = "In units of ‖v‖ of the layer. Without overfitting the two lines coincide; the grey ones are what chance gives."
        found.append(panel(name_of("separation", domain.name), f"Separation along the direction: {domain.name}", caption, draw_separation, domain))
    for centred, words in ((False, "as they are"), (True, "minus their mean")) if result.pairs else ():
        caption = f"Residuals {words}. Two random directions: {number(result.pairs[0].uncentred.random_mean, '.2f')}."
        name, size = f"agreement{'_centred' * centred}", 1.8 + 0.42 * len(result.domains)
        found.append(
            panel(
                name,
                f"First residual directions, {words}",
                caption,
                lambda axes, centred: draw_agreement(axes, result, centred=centred),
                centred,
                height=size,
            )
        )
    for pair in result.pairs[:_MOST_PAIRS]:
        if pair.uncentred.cosines:
            name = name_of("directions", pair.first, pair.second)
            caption = "|cos| of each leading direction of one domain with each of the other, not centred."
            found.append(
                panel(
                    name,
                    f"Directions of {pair.first} and {pair.second}",
                    caption,
                    draw_directions,
                    pair.uncentred,
                    pair.first,
                    pair.second,
                    height=2.6,
                )
            )
    return found + (_overlap_pictures(result) if result.overlaps else [])


def _overlap_pictures(result: Activations) -> list[Picture]:
    eta, layers = middle_eta(result), sorted({one.layer for one in result.overlaps})
    # The middle of what the paper averages over, 65 to 90 % of the depth.
    deep = min(layers, key=lambda layer: abs(layer - 0.775 * result.settings.last_layer))
    found = []
    for model in result.models:
        caption = f"States of the last prompt token minus their set's mean, at η = {eta:g}. No mark: the set does not vary there."
        draw = lambda axes, model: draw_overlaps(axes, result, model, eta, centred=True)  # noqa: E731
        found.append(panel(name_of("overlap", model), f"Prompt sets by layer: {model}", caption, draw, model))
    for centred, words in ((False, "as they are"), (True, "minus their mean")):
        caption = f"Under aligned at layer {deep}, states {words}; dotted: random subspaces of as many directions."
        sweep = lambda axes, centred: draw_sweep(axes, result, ALIGNED, deep, centred=centred)  # noqa: E731
        found.append(panel(f"sweep{'_centred' * centred}", f"Prompt sets against η, {words}", caption, sweep, centred))
    return found


def _tables(result: Activations) -> list[Table]:
    tables = []
    if result.domains:
        tables += [separations_table(result), positions_table(result), residuals_table(result)]
    if result.pairs:
        tables.append(agreements_table(result))
    if result.overlaps:
        tables.append(overlaps_table(result))
    return tables


def _details(result: Activations) -> tuple[tuple[str, str], ...]:
    settings = result.settings
    return (
        *((name, source_title(result.sources.get(name) or {})) for name in (BASE, ALIGNED)),
        *((f"domain {found.name}", f"{found.examples} of {found.source} (sha256 {found.sha256[:12]})") for found in result.domains),
        *((f"prompts {found.name}", f"{found.n} of {found.source} (sha256 {found.sha256[:12]})") for found in result.prompts),
        ("tokens of a response", f"the first {settings.tokens}"),
        ("last layer", f"{settings.last_layer}, {settings.last_layer_is}"),
        ("residual of a response", f"{settings.vector} over the tokens read"),
        ("precision", listed([f"{name} {dtype}" for name, dtype in settings.dtypes.items()])),
        ("intervals", settings.interval),
    )
