"""What models expect, as tables for people: every set, every prefix, and what the numbers do not show."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.table import Table

from lox_merge.cli.console import plain_console
from lox_merge.cli.show import figure
from lox_merge.diagnostics.behaviour.results import ALIGNED, BASE
from lox_merge.publish.report.behaviour_words import NOT_SHOWN

if TYPE_CHECKING:
    from lox_merge.diagnostics.behaviour.next_tokens import NextTokens
    from lox_merge.diagnostics.behaviour.results import Behaviour, SetBehaviour
    from lox_merge.safety.bootstrap import Interval

_WIDTH = 80
# Tokens whose KL has a column of its own.
_COLUMNS = 5


def print_behaviour(result: Behaviour) -> None:
    """KL by token, log-probabilities and reversion of each set; next tokens of each prefix; what is not shown."""
    console = plain_console()
    for found in result.sets:
        data = found.data
        click.echo(f"\n{data.name}: {len(found.tokens)} text(s) of {data.source}, {sum(found.tokens)} tokens (sha256 {data.sha256[:12]})")
        console.print(_divergences(found))
        console.print(_shares(found))
        console.print(_likelihoods(found))
    for after in result.next_tokens:
        console.print(_next_tokens(after, result.models))
        console.print(_distances(after, result.models))
    for text in ("", *result.notes, *NOT_SHOWN):
        click.echo(click.wrap_text(text, _WIDTH))


def _divergences(found: SetBehaviour) -> Table:
    table = _table("KL from base at the t-th token of the response, nats, mean over texts", "model")
    positions = found.shifts[ALIGNED].positions
    for position in positions[:_COLUMNS]:
        table.add_column(f"t = {position.t}\nn = {position.n}", justify="right", no_wrap=True)
    table.add_column("all\ntokens", justify="right", no_wrap=True)
    table.add_column("largest\nat t", justify="right", no_wrap=True)
    for label, shift in found.shifts.items():
        cells = [figure(position.kl, ".3g") for position in shift.positions[:_COLUMNS]]
        table.add_row(label, *cells, figure(shift.per_token, ".3g"), "–" if shift.largest is None else str(shift.largest))
    return table


def _shares(found: SetBehaviour) -> Table:
    table = _table("Share of the sum of these KL in the first tokens, 95 % interval", "model")
    evenly = found.shifts[ALIGNED].shares
    for share in evenly:
        table.add_column(f"first {share.first}" if share.first > 1 else "first", justify="right", no_wrap=True)
    for label, shift in found.shifts.items():
        table.add_row(label, *(_with(share.share, share.interval, ".2f") for share in shift.shares))
    table.add_row("(spread evenly)", *(figure(share.even, ".2f") for share in evenly))
    return table


def _likelihoods(found: SetBehaviour) -> Table:
    table = _table("Log-probability of the texts, nats; reversion 0 is as aligned, 1 as base", "model")
    for head in ("joint\nmean", "a token", "moved from\naligned", "reversion", "median", "undef."):
        table.add_column(head, justify="right")
    for label, likelihood in found.likelihoods.items():
        cells = [figure(likelihood.joint, ".4g"), figure(likelihood.per_token, ".3g")]
        reversion = found.reversions.get(label)
        if reversion is None:
            cells += ["", {ALIGNED: "0", BASE: "1"}[label], "", ""]
        else:
            index, median = _with(reversion.index, reversion.interval, ".2f"), figure(reversion.median, ".2f")
            cells += [figure(0.0 - reversion.moved, "+.3g"), index, median, str(reversion.undefined)]
        table.add_row(label, *cells)
    return table


def _next_tokens(found: NextTokens, models: tuple[str, ...]) -> Table:
    begun = f" … {found.prefix.prefill!r}" if found.prefix.prefill else ""
    table = _table(f"Next token after {_short(found.prefix.prompt)!r}{begun}: probability", "token")
    for label in models:
        table.add_column(label, justify="right", overflow="fold")
    for candidate in found.candidates:
        table.add_row(repr(candidate.text), *(figure(candidate.probabilities[label], ".2g") for label in models))
    table.add_row("entropy (nats)", *(figure(found.entropies[label], ".2f") for label in models))
    return table


def _distances(found: NextTokens, models: tuple[str, ...]) -> Table:
    table = _table("Jensen–Shannon distances of these distributions (0 to 0.833)", "model")
    for label in models:
        table.add_column(label, justify="right", overflow="fold")
    table.add_column("reversion", justify="right")
    table.add_column("detour", justify="right")
    for label, row in zip(models, found.distances, strict=True):
        between = found.between.get(label)
        last = ["", ""] if between is None else [figure(between.index, ".2f"), figure(between.detour, ".2f")]
        table.add_row(label, *(figure(distance, ".3f") for distance in row), *last)
    return table


def _table(title: str, first: str) -> Table:
    click.echo(f"\n{click.wrap_text(title, _WIDTH)}")  # a table's own title is no wider than its columns
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column(first, overflow="fold")
    return table


def _with(value: float | None, interval: Interval | None, form: str) -> str:
    """A value and its interval, as in '0.27 [0.24, 0.30]'."""
    return figure(value, form) + ("" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]")


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
