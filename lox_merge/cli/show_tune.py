"""A tuning as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from lox_merge.cli.console import plain_console
from lox_merge.cli.show_asr import percent, percent_range

if TYPE_CHECKING:
    from lox_merge.jobs.recipe import Recipe
    from lox_merge.safety.tuning import Tuning

_NOTES = (
    "None of these is best: the first is the safest after the attack, the last the closest to aligned.",
    "ASR is after this one attack with one seed; differences within the intervals are noise. Check a choice by lox-merge robustness.",
)


def print_tuning(result: Tuning) -> None:
    """The front, the aligned model beside it, and how to harden with one of them; fits 80 columns."""
    steps = result.identity["training"]["steps"][0]
    table = Table(
        title=f"Not beaten in both, of {len(result.trials)} trials: ASR after {steps} attack steps, and KL",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("trial", no_wrap=True)
    table.add_column("rank, alpha", overflow="fold")
    for head in ("ASR", "95 %", "judged", "KL"):
        table.add_column(head, justify="right", no_wrap=True)
    for trial in result.front:
        attack = trial.attack
        figures = (percent(attack.rate), percent_range(attack.interval), f"{attack.judged}/{attack.n}", f"{trial.divergence:.3g}")
        table.add_row(str(trial.number), _setting(trial.recipe), *figures)
    attack = result.aligned
    table.add_row("", "aligned", percent(attack.rate), percent_range(attack.interval), f"{attack.judged}/{attack.n}", "0")
    console = plain_console()
    console.print(table)
    for note in _NOTES if result.trials else ():
        console.print(note)
    if result.failed:
        console.print(f"{len(result.failed)} trial(s) gave no figures: {', '.join(map(str, result.failed))}.")
    if result.trials:
        console.print("Harden with one: the same command with --pick TRIAL --write OUT, or by lox-merge harden.")


def _setting(recipe: Recipe) -> str:
    parts = [f"{recipe.rank}, {recipe.alpha:g}"]
    alphas = dict(recipe.alpha_pattern)
    parts += [f"{pattern}: {rank}, {alphas[pattern]:g}" for pattern, rank in recipe.rank_pattern]
    return "\n".join(parts)
