"""An inspection as tables for people: every ratio beside what a random subspace gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
from rich.table import Table

from lox_merge.cli.console import plain_console
from lox_merge.cli.show import duration
from lox_merge.diagnostics.summary import COLUMNS, blocks, value_text
from lox_merge.diagnostics.weights import Inspection

_WIDTH = 80
_MOST_ROWS = 40
_MOST_MODELS = 2
NOT_SHOWN = (
    "What lies in the leading directions of alignment is not thereby safety: in the models studied, useful and harmful updates share them alike. "
    "Compare with the random columns, and measure behaviour (lox-merge asr, robustness)."
)


def print_inspection(result: Inspection, by: str = "kind") -> None:
    """Alignment, each fine-tuned model, a table by kind of module or layer, and notes."""
    document = result.document
    console = plain_console()
    click.echo(f"{result.whole.matrices} matrices, {result.linear.matrices} of them linear layers; {duration(document['seconds'])}")
    for block in blocks(document):
        table = _table(block.title, block.heading, *COLUMNS)
        for row in block.rows:
            table.add_row(*row)
        console.print(table)
    if by != "none":
        console.print(_groups(document["kinds" if by == "kind" else "layers"], result.labels, by))
    for text in [*result.notes, NOT_SHOWN]:
        click.echo(click.wrap_text(text, _WIDTH))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=None, pad_edge=False, padding=(0, 1))
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _groups(groups: list[dict[str, Any]], labels: Sequence[str], by: str) -> Table:
    """R_align, and R_ft/R_align of the first models that fit the width."""
    columns = [f"R_ft/R_align\n{label if len(label) <= 16 else label[:15] + '…'}" for label in labels[:_MOST_MODELS]]
    table = _table(f"By {by}: means over matrices, random in brackets", by, "matrices", "R_align", *columns)
    for group in groups[:_MOST_ROWS]:
        cells = [_pair(group["aligned"]["r"])] + [_pair(model["ratio"]) for model in group["finetuned"][:_MOST_MODELS]]
        table.add_row(group["name"], str(group["matrices"]), *cells)
    hidden = [f"{len(groups) - _MOST_ROWS} more rows"] * (len(groups) > _MOST_ROWS)
    hidden += [f"{len(labels) - _MOST_MODELS} more models"] * (len(labels) > _MOST_MODELS)
    if hidden:
        table.caption = f"and {', '.join(hidden)}: --json"
    return table


def _pair(statistic: dict[str, Any]) -> str:
    expected = "" if statistic["expected"] is None else f" ({statistic['expected']:.3f})"
    return value_text(statistic["mean"], statistic["undecided"]) + expected
