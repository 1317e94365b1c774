"""Two framings as a table for people."""

from __future__ import annotations

import click
from rich.table import Table

from lox_merge.cli.console import plain_console
from lox_merge.cli.show import figure
from lox_merge.publish.documents.framing import Framing, Mean
from lox_merge.publish.report.notes import FRAMING_NOT_SHOWN

_WIDTH = 80
_ROWS = (
    ("loss", "losses"),
    ("shuffled", "  chance: random order"),
    ("other_loss", "  other completion"),
    ("centred", "centred losses (chance: 0)"),
    ("other_centred", "  other completion"),
    ("gradient", "gradients"),
    ("same_framing", "  one framing, other completion"),
    ("other_completion", "  both framings, other completion"),
)


def print_framing(result: Framing) -> None:
    """A block of rows a model: means over pairs with intervals; then what they do not show."""
    first, second = result.data["first"], result.data["second"]
    for model in result.models:
        table = Table(title=f"\n{model.model}: {first.name} against {second.name}", title_justify="left", box=None, pad_edge=False)
        table.add_column("cosine", no_wrap=True)
        for head in ("mean", "95 % interval", "pairs"):
            table.add_column(head, justify="right", no_wrap=True)
        for name, text in _ROWS:
            found: Mean = getattr(model, name)
            ends = "undefined" if found.interval is None else f"{found.interval[0]:.3f} to {found.interval[1]:.3f}"
            table.add_row(text, figure(found.mean), ends, str(found.n))
        table.add_row("mean gradients of the two sets", figure(model.mean_gradient), "", str(len(model.pairs)))
        plain_console().print(table)
        click.echo(f"random directions in {model.entries:,} entries: 0 ± {model.band:.2g} (95 %)")
    for line in ("", *result.notes, *FRAMING_NOT_SHOWN):
        click.echo(click.wrap_text(line, _WIDTH))
