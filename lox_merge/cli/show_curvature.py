"""A measurement of curvature as tables for people, every figure beside what chance would give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from lox_merge.cli.console import plain_console
from lox_merge.cli.show import figure, print_pairs

if TYPE_CHECKING:
    from lox_merge.diagnostics.curvature.job import Curvature

_MOST_ROWS = 40
_WIDTH = 80


def print_curvature(result: Curvature) -> None:
    """The whole model, each layer, overlap scores, data sets by risk, and notes."""
    document, fisher = result.document, result.fisher
    completions = document["completions"]
    print_pairs(
        f"Curvature of {document['model']['title']}",
        [
            ("completions", f"{completions['used']} of {completions['examples']} in {completions['source']} (sha256 {completions['sha256'][:12]})"),
            ("parameters", f"{fisher['parameters']:,} in {len(result.parameters)} tensors; {document['passes']} pass(es)"),
            ("trace of F", figure(fisher["trace"], ".3g")),
            ("d and λ", f"{_count(fisher['d'])} and {figure(fisher['smallest'], '.3g')} ({_rule(document['settings'])})"),
            ("tail beyond d", figure(fisher["tail"], ".3g")),
            ("effective dimension", f"{figure(fisher['effective']['participation'], '.3g')} (participation), rank {fisher['rank']}"),
        ],
    )
    if result.layers:
        plain_console().print(_layers(result.layers))
    if result.finetuned:
        plain_console().print(_overlaps(result.finetuned))
        click.echo("In brackets: times the score of a random change of the same norms.")
    if result.data:
        plain_console().print(_data(result.data))
        click.echo(click.wrap_text(_DATA_WORDS, _WIDTH))
    for note in ("", *document["notes"]):
        click.echo(click.wrap_text(note, _WIDTH))


_DATA_WORDS = (
    "overlap: share of the gradient inside the subspace (in brackets: a random direction's). coupling: γ (of a random ∇g·g of its norm). "
    "loss: of safe log-likelihood at the last t, second order (first order included). Intervals: 95 %, over batches."
)


def _layers(layers: list[dict[str, Any]]) -> Table:
    table = _table("\nFisher matrix by layer")
    table.add_column("layer", overflow="fold")
    for head in ("trace", "d", "λ", "tail", "participation", "largest"):
        table.add_column(head, justify="right", no_wrap=True)
    for layer in layers[:_MOST_ROWS]:
        largest = layer["eigenvalues"][0] if layer["eigenvalues"] else None
        figures = (layer["smallest"], layer["tail"], layer["effective"]["participation"], largest)
        table.add_row(layer["name"], figure(layer["trace"], ".3g"), _count(layer["d"]), *(figure(value, ".3g") for value in figures))
    if len(layers) > _MOST_ROWS:
        table.caption = f"and {len(layers) - _MOST_ROWS} more layers: --json"
    return table


def _overlaps(finetuned: list[dict[str, Any]]) -> Table:
    table = _table("\nOverlap scores")
    table.add_column("model", overflow="fold")
    for head in ("‖Δθ‖", "by parameter", "joint", "predicted loss"):
        table.add_column(head, justify="right", no_wrap=True)
    projected = any("projected" in entry for model in finetuned for entry in model["parameters"])
    if projected:
        table.add_column("projected", justify="right")
    for model in finetuned:
        cells = [_times(model["score"], model["ratio"]), _times(model["joint"], model["joint_ratio"])]
        if projected:
            cells_projected = [_projected(model)]
        else:
            cells_projected = []
        table.add_row(model["name"], figure(model["norm"], ".3g"), *cells, figure(model["predicted_loss"], ".3g"), *cells_projected)
    return table


def _projected(model: dict[str, Any]) -> str:
    """The paper's estimate over the matrices that it covers: lowest to highest of its seeds, beside the exact score of the same ones."""
    covered = [entry for entry in model["parameters"] if "projected" in entry]
    sums = [sum(values) for values in zip(*(entry["projected"]["plain"] for entry in covered), strict=True)]
    exact = sum(entry["score"] for entry in covered)
    return f"{min(sums):.3g} to {max(sums):.3g} (exact {exact:.3g})" if sums else ""


def _data(data: list[dict[str, Any]]) -> Table:
    table = _table("\nData sets by risk")
    table.add_column("")
    table.add_column("data", overflow="fold")
    for head in ("overlap", "coupling γ", "95 % interval", "loss", "95 % interval"):
        table.add_column(head, justify="right")
    for record in sorted(data, key=lambda record: (record["rank"] is None, record["rank"])):
        if record["rank"] is None:
            table.add_row("", record["name"], *["undefined"] * 5)
            continue
        loss = record["predictions"][-1]["second_order_loss"]
        table.add_row(
            str(record["rank"]),
            record["name"],
            f"{record['overlap_share']['value']:.3f} ({record['expected_overlap_share']:.3f})",
            f"{record['coupling']['value']:.3g} ({record['expected_coupling']:.2g})",
            _range(record["coupling"]["interval"]),
            figure(loss["value"], ".2g"),
            _range(loss["interval"]),
        )
    return table


def _range(interval: list[float] | None) -> str:
    return "none" if interval is None else f"{interval[0]:.2g} to {interval[1]:.2g}"


def _times(value: float, ratio: float | None) -> str:
    return f"{value:.3g} ({figure(ratio, '.3g')})"


def _count(value: int | None) -> str:
    return "undefined" if value is None else str(value)


def _rule(settings: dict[str, Any]) -> str:
    return "given" if settings["dimension"] is not None else f"{100 * settings['energy']:g} % of the trace"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1))
