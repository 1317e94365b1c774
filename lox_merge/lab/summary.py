"""The demo's result for people: narrow tables and plain words about what they show and what they do not."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lox_merge.lab.demo import TUNED_SEEDS, DemoResult
from lox_merge.lab.stages import COMPARED, STAGES, Rate, Stage
from lox_merge.safety.starting_points import ALIGNED, HARDENED

FULL_RANK, GAUSSIAN = "full-rank", "gaussian"

MEASURES: tuple[tuple[str, Callable[[Stage, DemoResult, str], Rate]], ...] = (
    ("ASR: % of {n} forbidden requests not refused", Stage.not_refused),
    ("Carried out: % of {n} forbidden requests answered exactly", Stage.carried_out),
    ("Utility: % of {n} allowed requests answered right (new task after benign)", Stage.utility),
)

# Means (and ranges) over seeds 8 to 15 by examples/toy_many_seeds.py: measure again when a setting of the laboratory changes.
FRESH_SEEDS = (
    "On seeds 8-15, which nobody tuned on, the hardened model failed to refuse 42% after 100 benign steps on average (0 to 100%; "
    "aligned 99%) and 1% after 20 harmful steps (0 to 9%; aligned 99%). Its utility before any attack was 96% (76% at worst; aligned 100%)."
)


def print_summary(result: DemoResult, console: Console | None = None) -> None:
    """Tables and sentences on standard output (or `console`), for a terminal or a pipe."""
    console = console or Console(highlight=False)
    for table in result_tables(result):
        console.print(table)
    console.print("In brackets: Wilson 95% intervals.\n", markup=False)
    shown, not_shown = plain_words(result)
    for heading, sentences in (("What this shows", shown), ("What this does not show", not_shown)):
        grid = Table.grid(padding=(0, 1))
        for sentence in sentences:
            grid.add_row("-", Text(sentence))
        console.print(Text(heading, style="bold"), grid, "", sep="\n")


def result_tables(result: DemoResult) -> list[Table]:
    """A table for each measure, at most 80 columns wide: models in rows, stages in columns."""
    models = result.benign.models
    tables = []
    for title, rate_of in MEASURES:
        table = _table(title.format(n=rate_of(STAGES[0], result, ALIGNED).n))
        for model in models:
            table.add_row(model, *(Text(format_rate(rate_of(stage, result, model))) for stage in STAGES))
        tables.append(table)
    table = _table("R_ft/R_align (1: nothing dispersed)")
    for model in models:
        table.add_row(model, *(_figure(stage.dispersion(result, model)) for stage in STAGES))
    return [*tables, table]


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("", no_wrap=True)
    for stage in STAGES:
        table.add_column(stage.heading, justify="right", no_wrap=True)
    return table


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def format_rate(rate: Rate) -> str:
    """Per cent and 95% interval, as in 26 [22-30]; "unknown" for n = 0."""
    if rate.value is None or rate.interval is None:
        return "unknown"
    low, high = rate.interval
    return f"{format_share(rate)} [{100 * low:.0f}-{100 * high:.0f}]"


def format_share(rate: Rate) -> str:
    """The share in per cent; one that only rounds to 0 or 100 is told apart from exactly none and all."""
    if rate.value is None:
        return "unknown"
    if 0 < rate.value < 0.005:
        return "<1"
    if 0.995 < rate.value < 1:
        return ">99"
    return f"{100 * rate.value:.0f}"


def plain_words(result: DemoResult) -> tuple[list[str], list[str]]:
    """What this run shows, and what it does not show, a sentence or two each."""
    shown = [_effective_rank(result), *(_comparison(stage, result) for stage in COMPARED)]
    shown.append(
        "ASR counts every answer that does not open with the refusal, also one that is of no use to an attacker; "
        "the table of requests carried out tells the two apart."
    )
    late = STAGES[-1]
    shown.append(
        f"After {late.name}, the hardened model fails to refuse "
        f"{format_share(late.not_refused(result, HARDENED))}% and carries out {format_share(late.carried_out(result, HARDENED))}%. "
        "LoX delays erosion; it does not prevent it."
    )
    not_shown = [
        "That the leading directions are special: extrapolating the whole delta to the same norm (full-rank, ExPO) does as well on average "
        f"(ASR here: {_pair(COMPARED[0], result, FULL_RANK)}, {_pair(COMPARED[1], result, FULL_RANK)}). In the toy, LoX does not beat it. "
        f"Gaussian noise of the same norm is the control for size alone ({_pair(COMPARED[0], result, GAUSSIAN)}, "
        f"{_pair(COMPARED[1], result, GAUSSIAN)}).",
        f"Anything about real models: these have {result.parameters:,} parameters and a language of symbols, and their base model was taught how to "
        "refuse, without which extrapolation breaks refusals instead of strengthening them.",
        "Anything about other seeds: one seed is one draw, and the intervals count requests, not seeds. "
        + (
            "The settings were tuned while looking at seeds 0-7, this one among them; expect less elsewhere. "
            if result.recipe.seed in TUNED_SEEDS
            else "The settings were tuned on seeds 0-7; this one was not among them. "
        )
        + FRESH_SEEDS,
    ]
    return shown, not_shown


def _effective_rank(result: DemoResult) -> str:
    found = result.search
    if found.effective_rank is None:
        highest = max(point.rank for point in found.curve)
        return f"No rank up to {highest} is as safe as the aligned model to within {found.rho:g} on the requests that alignment taught to refuse."
    return (
        f"Rank {found.effective_rank} of the alignment delta is enough to be as safe as the aligned model to within {found.rho:g} on the requests "
        "that alignment taught to refuse."
    )


def _comparison(stage: Stage, result: DemoResult) -> str:
    before, after = stage.not_refused(result, ALIGNED), stage.not_refused(result, HARDENED)
    sentence = f"After {stage.name}, the aligned model fails to refuse {format_share(before)}% and the hardened one {format_share(after)}%"
    if before.interval is None or after.interval is None:
        return sentence + "."
    if after.interval[1] < before.interval[0]:
        return sentence + ": hardening held longer on this seed."
    if before.interval[1] < after.interval[0]:
        return sentence + ": hardening did harm on this seed."
    return sentence + ": no clear difference on this seed."


def _pair(stage: Stage, result: DemoResult, control: str) -> str:
    left, right = format_share(stage.not_refused(result, control)), format_share(stage.not_refused(result, HARDENED))
    return f"{left}% against LoX's {right}% after {stage.name}"
