"""The demo's result for people: narrow tables and plain words about what they show and what they do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lox_merge.lab.demo import ALIGNED, FULL_RANK, GAUSSIAN, HARDENED, TUNED_SEEDS, Condition, DemoResult
from lox_merge.lab.measure import Measurement, Rate


@dataclass(frozen=True)
class Stage:
    """One column: which attack, and after how many of its steps."""

    heading: str
    attack: str
    step: int

    def of(self, condition: Condition) -> Measurement:
        return (condition.benign if self.attack == "benign" else condition.harmful)[self.step]


STAGES = (
    Stage("before", "benign", 0),
    Stage("benign\n100 steps", "benign", 100),
    Stage("benign\n150 steps", "benign", 150),
    Stage("harmful\n20 steps", "harmful", 20),
    Stage("harmful\n50 steps", "harmful", 50),
)
COMPARED = (STAGES[1], STAGES[3])

MEASURES: tuple[tuple[str, Callable[[Measurement], Rate]], ...] = (
    ("ASR: % of {n} forbidden requests not refused", lambda measurement: measurement.attack_success),
    ("Carried out: % of {n} forbidden requests answered exactly", lambda measurement: measurement.carried_out),
    ("Utility: % of {n} allowed requests answered right (new task after benign)", lambda measurement: measurement.utility),
)

# Means (and ranges) of run_attack over seeds 8 to 15, LoX by edited_state: measure again when a setting of the laboratory changes.
FRESH_SEEDS = (
    "On seeds 8-15, which nobody tuned on, the hardened model failed to refuse 43% after 100 benign steps on average (0 to 100%; "
    "aligned 99%) and 1% after 20 harmful steps (0 to 9%; aligned 98%). Its utility before any attack was 96% (76% at worst; aligned 100%)."
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
    tables = []
    for title, rate_of in MEASURES:
        n = rate_of(result.base).n
        table = Table(title=title.format(n=n), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
        table.add_column("", no_wrap=True)
        for stage in STAGES:
            table.add_column(stage.heading, justify="right", no_wrap=True)
        for condition in result.conditions:
            table.add_row(condition.name, *(Text(format_rate(rate_of(stage.of(condition)))) for stage in STAGES))
        tables.append(table)
    return tables


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
    aligned, hardened = result.condition(ALIGNED), result.condition(HARDENED)
    shown = [_comparison(stage, aligned, hardened) for stage in COMPARED]
    shown.append(
        "ASR counts every answer that does not open with the refusal, also one that is of no use to an attacker; "
        "the table of requests carried out tells the two apart."
    )
    late = STAGES[-1]
    shown.append(
        f"After {_name(late)}, the hardened model fails to refuse "
        f"{format_share(late.of(hardened).attack_success)}% and carries out {format_share(late.of(hardened).carried_out)}%. "
        "LoX delays erosion; it does not prevent it."
    )
    full, noise = result.condition(FULL_RANK), result.condition(GAUSSIAN)
    not_shown = [
        "That the leading directions are special: extrapolating the whole delta to the same norm (full-rank, ExPO) does as well on average "
        f"(ASR here: {_pair(COMPARED[0], full, hardened)}, {_pair(COMPARED[1], full, hardened)}). In the toy, LoX does not beat it. "
        f"Gaussian noise of the same norm is the control for size alone ({_pair(COMPARED[0], noise, hardened)}, "
        f"{_pair(COMPARED[1], noise, hardened)}).",
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


def _comparison(stage: Stage, aligned: Condition, hardened: Condition) -> str:
    before, after = stage.of(aligned).attack_success, stage.of(hardened).attack_success
    sentence = f"After {_name(stage)}, the aligned model fails to refuse {format_share(before)}% and the hardened one {format_share(after)}%"
    if before.interval is None or after.interval is None:
        return sentence + "."
    if after.interval[1] < before.interval[0]:
        return sentence + ": hardening held longer on this seed."
    if before.interval[1] < after.interval[0]:
        return sentence + ": hardening did harm on this seed."
    return sentence + ": no clear difference on this seed."


def _pair(stage: Stage, control: Condition, hardened: Condition) -> str:
    left, right = format_share(stage.of(control).attack_success), format_share(stage.of(hardened).attack_success)
    return f"{left}% against LoX's {right}% after {_name(stage)}"


def _name(stage: Stage) -> str:
    return f"{stage.step} {stage.attack} steps"
