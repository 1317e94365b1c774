"""Robustness as tables for people, and in words what they do not show."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

import click
from rich.table import Table

from lox_merge.cli.console import plain_console
from lox_merge.cli.show import figure
from lox_merge.cli.show_asr import judge_title, percent, percent_range
from lox_merge.publish.documents import robustness as documents
from lox_merge.publish.documents.shape import read_as
from lox_merge.publish.report.notes import robustness_notes

if TYPE_CHECKING:
    from lox_merge.safety.robustness import Robustness

_WIDTH = 80


def print_robustness(result: Robustness) -> None:
    """One table per attack, seed and judge; medians over seeds; what is not shown."""
    prompts = result.curves[0].points[0].evaluation.prompts
    click.echo(f"{prompts['n']} prompt(s) of {prompts['source']} (sha256 {prompts['sha256'][:12]})")
    judges = list(result.curves[0].points[0].evaluation.verdicts)
    for attack in result.attacks:
        for judge in judges:
            for seed in result.seeds:
                plain_console().print(_curves(result, attack.name, judge, seed))
            if len(result.seeds) > 1:
                plain_console().print(_medians(result, attack.name, judge))
    document = read_as(documents.Robustness, result.to_json(), "the comparison")
    for line in ("", *robustness_notes(document)):
        click.echo(click.wrap_text(line, _WIDTH))


def _curves(result: Robustness, attack: str, judge: str, seed: int) -> Table:
    curves = [curve for curve in result.curves if (curve.attack, curve.seed) == (attack, seed)]
    title = judge_title(curves[0].points[0].evaluation, judge).replace("\n", " ")
    table = _table(f"\nAttack {attack}, seed {seed}, judged by {title}")
    table.add_column("model", overflow="fold")
    for head in ("step", "ASR", "95 % interval", "against\naligned", "p", "R_ft/\nR_align"):
        table.add_column(head, justify="right", no_wrap=True)
    measures = list(curves[0].points[0].utility)
    for name in measures:
        table.add_column(name.replace(" ", "\n"), justify="right")
    for curve in curves:
        for point in curve.points:
            figures, compared = point.evaluation.attack_success[judge], result.comparison(curve, point.step, judge)
            table.add_row(
                curve.model if point is curve.points[0] else "",
                str(point.step),
                percent(figures.rate),
                percent_range(figures.interval),
                "" if compared is None else "undefined" if compared.difference is None else f"{100 * compared.difference:+.1f}",
                "" if compared is None else figure(compared.p_value, ".1g"),
                figure(curve.dispersion(point.step), ".2f"),
                *(figure(point.utility[name], ".3g") for name in measures),
            )
    return table


def _medians(result: Robustness, attack: str, judge: str) -> Table:
    table = _table(f"\nAttack {attack}: ASR over {len(result.seeds)} seeds, judged by {judge}")
    table.add_column("model", overflow="fold")
    for head in ("step", "median", "lowest to highest", "seeds"):
        table.add_column(head, justify="right", no_wrap=True)
    for model in result.models:
        for step in result.settings.steps:
            points = [result.curve(attack, model, seed).point(step) for seed in result.seeds]
            rates = [rate for point in points if (rate := point.evaluation.attack_success[judge].rate) is not None]
            range_ = (min(rates), max(rates)) if rates else None
            table.add_row(model, str(step), percent(median(rates) if rates else None), percent_range(range_), str(len(rates)))
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1))
