"""What hidden states say, as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich.table import Table

from lox_merge.cli.console import plain_console
from lox_merge.cli.show import figure
from lox_merge.publish.report.activations_words import NOT_SHOWN
from lox_merge.safety.model_labels import ALIGNED, BASE

if TYPE_CHECKING:
    from lox_merge.diagnostics.activations.results import Activations, Agreement, Domain, DomainPair, LayerDirection, Measure, SetOverlap

_WIDTH = 80
# Layers with a row of their own; the JSON has all.
_MOST_LAYERS = 12


def print_activations(result: Activations) -> None:
    """Directions and positions of each domain, residuals, overlaps; what is not shown."""
    console = plain_console()
    for domain in result.domains:
        data = domain.data
        click.echo(
            f"\n{data.name}: {len(domain.lengths)} response(s) of {data.source}, {sum(domain.lengths)} tokens read (sha256 {data.sha256[:12]})"
        )
        console.print(_directions(domain))
        if len(result.models) > 2:
            console.print(_positions(domain, result.models))
    if result.domains:
        console.print(_residuals(result.domains))
    if result.pairs:
        console.print(_agreements(result.pairs))
    if result.overlaps:
        console.print(_overlaps(result))
    for text in ("", *result.notes, *NOT_SHOWN):
        click.echo(click.wrap_text(text, _WIDTH))


def _directions(domain: Domain) -> Table:
    table = _table("Separation of aligned from base along the alignment direction", "layer")
    for head in ("in sample", "cross-validated", "labels\nswapped", "random\ndirection"):
        table.add_column(head, justify="right", overflow="fold")
    for layer in _thinned(domain.layers):
        cells = [_measured(layer.separation), _measured(layer.cross_validated), figure(layer.swapped, ".3g"), figure(layer.random, ".3g")]
        table.add_row(str(layer.layer), *cells)
    return table


def _positions(domain: Domain, models: Sequence[str]) -> Table:
    table = _table("Position on it: 0 is base, 1 is aligned; off: distance from the line, same unit", "model")
    for head in ("layer", "position", "cross-validated", "off"):
        table.add_column(head, justify="right", overflow="fold")
    for model in (model for model in models if model not in (BASE, ALIGNED)):
        for place, layer in enumerate(_thinned(domain.layers)):
            found = layer.models[model]
            cells = [_measured(found.position, ".2f"), _measured(found.cross_validated, ".2f"), figure(found.off_line, ".2f")]
            table.add_row("" if place else model, str(layer.layer), *cells)
    return table


def _residuals(domains: Sequence[Domain]) -> Table:
    table = _table("aligned − base at the last layer: share of ‖R‖² in its leading directions", "domain")
    for head in ("first", "second", "the mean\nalone", "|cos| of first\nand mean", "first,\ncentred"):
        table.add_column(head, justify="right")
    for domain in domains:
        found = domain.residual
        shares, centred = [*found.shares, None, None], [*found.centred_shares, None]
        values = (shares[0], shares[1], found.mean_share, found.mean_cosine, centred[0])
        table.add_row(domain.data.name, *(figure(value, ".2f") for value in values))
    return table


def _agreements(pairs: Sequence[DomainPair]) -> Table:
    table = _table("|cos| of the leading directions of two domains", "domains")
    for head in ("", "|cos|", "rows\nshuffled", "p, as\nlittle", "random\nmean", "p, random"):
        table.add_column(head, justify="right")
    for pair in pairs:
        for name, found in (("as it is", pair.uncentred), ("centred", pair.centred)):
            table.add_row(f"{pair.first} / {pair.second}" if name == "as it is" else "", name, *_agreement(found))
    return table


def _agreement(found: Agreement) -> list[str]:
    first = found.cosines[0][0] if found.cosines and found.cosines[0] else None
    values = [figure(first, ".2f"), figure(found.permuted_mean, ".2f"), figure(found.p_less, ".3f"), figure(found.random_mean, ".2f")]
    return [*values, figure(found.p_random, ".2g")]


def _overlaps(result: Activations) -> Table:
    etas = list(result.settings["etas"])
    shown = min(range(len(etas)), key=lambda place: abs(etas[place] - 0.9))
    title = f"MSO of prompt sets at η = {etas[shown]:g}, means over layers {_layers(result)}; halves: of one set"
    table = _table(title, "sets")
    for head in ("model", "MSO", "expected", "halves", "centred", "expected ", "halves "):
        table.add_column(head, justify="right", overflow="fold")
    groups: dict[tuple[str, str, str], list[SetOverlap]] = {}
    for overlap in _deep(result):
        groups.setdefault((overlap.first, overlap.second, overlap.model), []).append(overlap)
    for (first, second, model), found in groups.items():
        cells = []
        for curves in ([one.uncentred for one in found], [one.centred for one in found]):
            points = [curve[shown] for curve in curves]
            cells += [_mean([point.mso for point in points]), _mean([point.expected for point in points])]
            cells.append(_mean([half for point in points for half in point.halves]))
        table.add_row(f"{first} / {second}", model, *cells)
    return table


def _deep(result: Activations) -> list[SetOverlap]:
    """Layers between 65 and 90 % of the depth, as in the paper; all where none was asked for."""
    depth = int(result.settings["last_layer"])
    deep = [overlap for overlap in result.overlaps if 0.65 * depth <= overlap.layer <= 0.9 * depth]
    return deep or list(result.overlaps)


def _layers(result: Activations) -> str:
    return ", ".join(map(str, sorted({overlap.layer for overlap in _deep(result)})))


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return figure(sum(known) / len(known) if known else None, ".2f")


def _thinned(layers: Sequence[LayerDirection]) -> list[LayerDirection]:
    """All layers, or evenly spread ones with the first and the last."""
    if len(layers) <= _MOST_LAYERS:
        return list(layers)
    return [layers[round(place * (len(layers) - 1) / (_MOST_LAYERS - 1))] for place in range(_MOST_LAYERS)]


def _measured(measure: Measure, form: str = ".3g") -> str:
    ends = measure.interval
    return figure(measure.value, form) + ("" if ends is None else f" [{ends[0]:{form}}, {ends[1]:{form}}]")


def _table(title: str, first: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=None, pad_edge=False, padding=(0, 1))
    table.add_column(first, overflow="fold")
    return table
