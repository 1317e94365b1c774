"""The demo over several seeds with all controls: medians and ranges instead of one draw."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lox_merge.lab.demo import TUNED_SEEDS, DemoResult, Report, run_demo
from lox_merge.lab.stages import STAGES, Rate, Stage

SEEDS = 5

Measure = Callable[[Stage, DemoResult, str], float | None]


def _value(rate_of: Callable[[Stage, DemoResult, str], Rate]) -> Measure:
    return lambda stage, result, model: rate_of(stage, result, model).value


MEASURES: tuple[tuple[str, Measure], ...] = (
    ("ASR", _value(Stage.not_refused)),
    ("carried out", _value(Stage.carried_out)),
    ("utility (new task after benign)", _value(Stage.utility)),
    ("R_ft/R_align", Stage.dispersion),
)


@dataclass(frozen=True)
class Spread:
    """One figure over seeds. None: undefined on some seed."""

    median: float
    mean: float
    low: float
    high: float


def run_full(out: Path, *, seeds: Sequence[int], cache_dir: Path | None = None, progress: Report | None = None) -> list[DemoResult]:
    """`run_demo` with all controls for every seed, each into its folder out/seed-N. Raises OutputError."""
    results = []
    for seed in seeds:
        if progress:
            progress(f"seed {seed}")
        results.append(run_demo(out / f"seed-{seed}", seed=seed, cache_dir=cache_dir, controls=True, progress=progress))
    return results


def spread(results: Sequence[DemoResult], measure: Measure, stage: Stage, model: str) -> Spread | None:
    """A figure over the seeds; None where it is undefined on one of them."""
    values = [measure(stage, result, model) for result in results]
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return Spread(statistics.median(known), statistics.fmean(known), min(known), max(known))


def full_json(results: Sequence[DemoResult]) -> dict[str, Any]:
    """Spreads by measure, model and stage, the effective ranks, and the whole document of each seed."""
    seeds = [result.recipe.seed for result in results]
    return {
        "command": "demo --full",
        "seeds": seeds,
        "seeds_used_for_tuning": [seed for seed in seeds if seed in TUNED_SEEDS],
        "effective_ranks": [result.search.effective_rank for result in results],
        "over_seeds": {
            name: {
                model: {stage.heading.replace("\n", " "): _plain(spread(results, measure, stage, model)) for stage in STAGES}
                for model in results[0].benign.models
            }
            for name, measure in MEASURES
        },
        "runs": [result.to_json() for result in results],
    }


def _plain(found: Spread | None) -> dict[str, float] | None:
    return None if found is None else {"median": found.median, "mean": found.mean, "lowest": found.low, "highest": found.high}


def print_full(results: Sequence[DemoResult], console: Console | None = None) -> None:
    """Medians and ranges over seeds, at most 80 columns wide, and what they do not show."""
    console = console or Console(highlight=False)
    seeds = ", ".join(str(result.recipe.seed) for result in results)
    for name, measure in MEASURES:
        table = Table(
            title=Text(f"{name}, %: median [lowest-highest] over seeds {seeds}"),
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            padding=0,
            pad_edge=False,
        )
        table.add_column("", no_wrap=True)
        for stage in STAGES:
            table.add_column(stage.heading, justify="right", no_wrap=True)
        for model in results[0].benign.models:
            table.add_row(model, *(Text(_cell(spread(results, measure, stage, model))) for stage in STAGES))
        console.print(table)
    ranks = ", ".join("none" if result.search.effective_rank is None else str(result.search.effective_rank) for result in results)
    console.print(f"Effective ranks: {ranks}.")
    tuned = [result.recipe.seed for result in results if result.recipe.seed in TUNED_SEEDS]
    if tuned:
        console.print(f"Seeds {', '.join(map(str, tuned))} were looked at while the settings were tuned; expect less on others (--seed 8).")
    console.print("Hardening delays erosion; where full-rank does as well as LoX, the leading directions are not the cause.")


def _cell(found: Spread | None) -> str:
    if found is None:
        return "undefined"
    middle, low, high = (f"{100 * value:.0f}" for value in (found.median, found.low, found.high))
    return middle if low == high else f"{middle} [{low}-{high}]"
