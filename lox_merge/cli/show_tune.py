"""A tuning as a table and a picture for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lox_merge.cli.show_asr import percent, percent_range
from lox_merge.errors import WriteError

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
    console = Console(highlight=False)
    console.print(table)
    for note in _NOTES:
        console.print(note)
    if result.failed:
        console.print(f"{len(result.failed)} trial(s) gave no figures: {', '.join(map(str, result.failed))}.")
    console.print("Harden with one: the same command with --pick TRIAL --write OUT, or by lox-merge harden.")


def _setting(recipe: Recipe) -> str:
    parts = [f"{recipe.rank}, {recipe.alpha:g}"]
    alphas = dict(recipe.alpha_pattern)
    parts += [f"{pattern}: {rank}, {alphas[pattern]:g}" for pattern, rank in recipe.rank_pattern]
    return "\n".join(parts)


def plot_tuning(result: Tuning, file: Path) -> None:
    """Every trial by KL and ASR, the front connected, the aligned model at KL 0; SVG or PNG by the suffix. Raises WriteError."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "lox-merge"  # the same result gives the same bytes
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    others = [trial for trial in result.trials if not trial.on_front]
    axes.scatter([trial.divergence for trial in others], [trial.attack.rate for trial in others], color="tab:gray", label="beaten by another")
    front = result.front
    rates = [trial.attack.rate or 0.0 for trial in front]
    intervals = [trial.attack.interval or (rate, rate) for trial, rate in zip(front, rates, strict=True)]
    errors = (
        [max(0.0, rate - low) for rate, (low, _) in zip(rates, intervals, strict=True)],
        [max(0.0, high - rate) for rate, (_, high) in zip(rates, intervals, strict=True)],
    )
    axes.errorbar([trial.divergence for trial in front], rates, yerr=errors, marker="o", capsize=3, color="tab:blue", label="front, 95 % interval")
    for trial in front:
        axes.annotate(str(trial.number), (trial.divergence, trial.attack.rate), textcoords="offset points", xytext=(5, 5), fontsize="small")
    if result.aligned.rate is not None:
        axes.plot([0], [result.aligned.rate], marker="*", markersize=12, linestyle="", color="tab:red", label="aligned")
    steps = result.identity["training"]["steps"][0]
    axes.set(xlabel="KL from aligned on harmless prompts (nats)", ylabel=f"ASR after {steps} attack steps", ylim=(-0.03, 1.03))
    axes.legend(fontsize="small")
    try:
        picture.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    except OSError as error:
        raise WriteError(f"the plot {file} can't be written: {error.strerror}. Make room or permissions and try again.") from error
    finally:
        pyplot.close(picture)
