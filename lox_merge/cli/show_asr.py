"""Attack success as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.table import Table

from lox_merge.cli.console import plain_console
from lox_merge.cli.show import figure, print_utility
from lox_merge.safety.asr import Comparison, agreement, by_category
from lox_merge.safety.types import AttackSuccess, Evaluation


def percent(value: float | None) -> str:
    return "undefined" if value is None else f"{100 * value:.1f} %"


def percent_range(interval: tuple[float, float] | None) -> str:
    """Both ends without signs of percent, which the column's head gives."""
    return "undefined" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def attack_cells(attack: AttackSuccess) -> tuple[str, str, str]:
    """A rate as a fraction, its interval, and how many replies were judged, for narrow tables."""
    interval = "undefined" if attack.interval is None else f"{attack.interval[0]:.2f}–{attack.interval[1]:.2f}"
    return figure(attack.rate), interval, f"{attack.judged}/{attack.n}"


def judge_title(evaluation: Evaluation, judge: str) -> str:
    """The judge's name, with the label that its identity carries ("smoke test")."""
    label = evaluation.judges.get(judge, {}).get("label") if evaluation.judges.get(judge, {}).get("kind") == "keyword" else None
    return f"{judge}\n({label})" if label else judge


def print_evaluations(evaluations: Sequence[Evaluation], comparisons: Sequence[Comparison], utility: Sequence[Mapping[str, float | None]]) -> None:
    """ASR of every model and judge; differences to the first model; agreement of the judges; utility of each model."""
    prompts = evaluations[0].prompts
    table = _table(f"Attack success: {prompts['n']} prompt(s) of {prompts['source']} (sha256 {prompts['sha256'][:12]})")
    for head in ("model", "judge"):
        table.add_column(head, overflow="fold")
    for head in ("ASR", "95 % interval", "n", "judged", "un-\ndecided", "score"):
        table.add_column(head, justify="right", no_wrap=True)
    for evaluation in evaluations:
        for judge, figures in evaluation.attack_success.items():
            table.add_row(
                evaluation.title,
                judge_title(evaluation, judge),
                percent(figures.rate),
                percent_range(figures.interval),
                *(str(count) for count in (figures.n, figures.judged, figures.undecided)),
                "-" if figures.mean_score is None else f"{figures.mean_score:.2f}",
            )
    plain_console().print(table)
    _print_categories(evaluations)
    if comparisons:
        _print_comparisons(evaluations[0], comparisons)
    _print_agreement(evaluations)
    print_utility("model", [(evaluation.title, found) for evaluation, found in zip(evaluations, utility, strict=True)])
    if any(identity.get("kind") == "keyword" for identity in evaluations[0].judges.values()):
        click.echo("keyword is a smoke test: it looks for refusal phrases, not for harm.")


def _print_categories(evaluations: Sequence[Evaluation]) -> None:
    """ASR by category of prompt, where there are several."""
    table = _table("By category")
    for head in ("model", "judge", "category"):
        table.add_column(head, overflow="fold")
    for head in ("ASR", "95 % interval", "judged"):
        table.add_column(head, justify="right", no_wrap=True)
    for evaluation in evaluations:
        for judge in evaluation.verdicts:
            found = by_category(evaluation, judge)
            for category, figures in found.items() if len(found) > 1 else ():
                table.add_row(evaluation.title, judge, category, percent(figures.rate), percent_range(figures.interval), str(figures.judged))
    if table.row_count:
        plain_console().print(table)


def _print_comparisons(first: Evaluation, comparisons: Sequence[Comparison]) -> None:
    table = _table(f"Against {first.title} on the same prompts: percentage points, exact McNemar test")
    for head in ("model", "judge"):
        table.add_column(head, overflow="fold")
    for head in ("change", "95 % interval", "pairs", "only\nfirst", "only\nthis", "p"):
        table.add_column(head, justify="right", no_wrap=True)
    for comparison in comparisons:
        table.add_row(
            comparison.second,
            judge_title(first, comparison.judge),
            "undefined" if comparison.difference is None else f"{100 * comparison.difference:+.1f}",
            percent_range(comparison.interval),
            *(str(count) for count in (comparison.n, comparison.only_first, comparison.only_second)),
            "undefined" if comparison.p_value is None else f"{comparison.p_value:.2g}",
        )
    plain_console().print(table)


def _print_agreement(evaluations: Sequence[Evaluation]) -> None:
    pairs = [(evaluation.title, pair) for evaluation in evaluations for pair in agreement(evaluation)]
    if not pairs:
        return
    table = _table("Agreement of the judges beyond chance (Cohen's kappa)")
    for head in ("model", "judge", "and judge"):
        table.add_column(head, overflow="fold")
    for head in ("kappa", "replies"):
        table.add_column(head, justify="right")
    for title, pair in pairs:
        table.add_row(title, pair.first, pair.second, "undefined" if pair.kappa is None else f"{pair.kappa:.2f}", str(pair.n))
    plain_console().print(table)


def print_dry_run(models: Sequence[str], prompts: Any, judges: Sequence[Any]) -> None:
    """What would be done, and one filled prompt of every judge that has one. Nothing is loaded, asked or paid."""
    from lox_merge.safety.types import Exchange

    click.echo(f"{len(prompts)} prompt(s) of {prompts.source} (sha256 {prompts.sha256[:12]})")
    click.echo(f"{len(models)} model(s): {', '.join(models)}")
    for judge in judges:
        click.echo(f"judge {judge.name}: up to {len(models) * len(prompts)} replies to judge")
        if hasattr(judge, "preview"):
            click.echo("its first prompt would be:\n")
            click.echo(judge.preview(Exchange(prompts.prompts[0].text, "(the model's reply)")))
    click.echo("Dry run: no model was loaded, no judge was asked, nothing was written.")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1))
