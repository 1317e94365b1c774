"""Measured figures as the lines and tables of a card, and what they do not show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median
from typing import Any

from lox_merge.publish.documents.robustness import ALIGNED, HARDENED
from lox_merge.publish.documents.shape import AttackRate
from lox_merge.publish.results import ROLES, AttackPoint, Measured

_MODELS = {"base": "base (pre-trained)", "aligned": "aligned (before)", "hardened": "**this model** (after)"}
_UNDER_ATTACK = {"aligned": "aligned", HARDENED: "**this model**"}
_MOST_ROWS = 24
_MARKS = re.compile(r"[`*\[\]]")  # of code, emphasis, links and pictures


def percent(value: float | None, form: str = ".1f") -> str:
    return "undefined" if value is None else f"{100 * value:{form}} %"


def interval_text(interval: tuple[float, float] | None) -> str:
    return "undefined" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def asr_table(measured: Measured) -> list[list[str]]:
    """model, judge, prompts, ASR, interval, n judged, undecided; the models in the order of their making."""
    rows = sorted(dict.fromkeys((row.role, row.judge, row.prompts.source, row.figures, row.smoke_test) for row in measured.asr), key=_order)
    return [
        [
            _MODELS[role],
            plain(judge) + (" (smoke test)" if smoke else ""),
            plain(prompts),
            percent(figures.rate),
            interval_text(figures.interval),
            f"{figures.judged} of {figures.n}",
            str(figures.undecided),
        ]
        for role, judge, prompts, figures, smoke in rows
    ]


def _order(row: tuple[str, str, str, AttackRate, bool]) -> tuple[str, str, int]:
    return row[2], row[1], ROLES.index(row[0])


def paired_lines(measured: Measured) -> list[str]:
    """Each comparison with aligned on the same prompts as one sentence."""
    lines = []
    for one in measured.paired:
        if one.difference is None:
            lines.append(f"Judged by {plain(one.judge)}, no prompt was decided for both models, so they cannot be compared.")
            continue
        p = "undefined" if one.p_value is None else f"{one.p_value:.2g}"
        lines.append(
            f"Against aligned on the same {one.n} prompts, judged by {plain(one.judge)}: {100 * one.difference:+.1f} percentage points "
            f"(95 % interval {interval_text(one.interval)}, exact McNemar p = {p})."
        )
    return lines


def attack_table(measured: Measured) -> list[list[str]]:
    """attack, model, steps, judge, ASR, interval or range over seeds, n, R_ft/R_align. Long curves: first and last step of each."""
    points = measured.attacks
    if len(points) > _MOST_ROWS:
        ends = [point for curves in measured.compared for point in curves if point.step in (first_step(curves), last_step(curves))]
        points = [point for point in points if point in ends]
    return [
        [
            plain(point.attack),
            _UNDER_ATTACK.get(point.model, f"control: {plain(point.model)}"),
            str(point.step),
            plain(point.judge) + (" (smoke test)" if point.smoke_test else ""),
            percent(_middle(point)),
            _spread(point),
            f"{sum(figures.judged for figures in point.figures)} of {sum(figures.n for figures in point.figures)}",
            "undefined" if None in point.dispersion else f"{median(value for value in point.dispersion if value is not None):.2f}",
        ]
        for point in points
    ]


def first_step(curves: Sequence[AttackPoint]) -> int:
    return min(point.step for point in curves)


def last_step(curves: Sequence[AttackPoint]) -> int:
    """Of one of `Measured.compared`: other attacks may have had other steps."""
    return max(point.step for point in curves)


def _middle(point: AttackPoint) -> float | None:
    known = [figures.rate for figures in point.figures if figures.rate is not None]
    return median(known) if known else None


def _spread(point: AttackPoint) -> str:
    if len(point.figures) == 1:
        return interval_text(point.figures[0].interval)
    known = [figures.rate for figures in point.figures if figures.rate is not None]
    return f"{interval_text((min(known), max(known)))} over {len(point.figures)} seeds" if known else "undefined"


def utility_table(measured: Measured) -> list[list[str]]:
    """measure, aligned, this model."""
    values = {(row.measure, row.role): row.value for row in measured.utility}
    measures = dict.fromkeys(row.measure for row in measured.utility)
    return [[plain(measure), *(_figure(values.get((measure, role))) for role in ("aligned", "hardened"))] for measure in measures]


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"


def search_lines(measured: Measured) -> list[str]:
    """How the rank was found, or that another one was used."""
    lines = []
    for found in measured.search:
        tried, prompts = ", ".join(map(str, found["tried"])), found["prompts"]
        asked = f"{prompts.n} prompts of {plain(prompts.source)}, judged by {plain(found['judge'])}"
        protocol = f"(ρ = {found['rho']:g}, {asked}; tried: {tried})"
        if found["rank"] is None:
            lines.append(f"No tried rank was as safe as aligned {protocol}; the rank used here was chosen otherwise.")
        else:
            other = "" if found["used"] else "; this model uses another rank"
            lines.append(f"The effective rank by behaviour is {found['rank']} {protocol}{other}.")
    return lines


def control_lines(measured: Measured) -> list[str]:
    """What the edits of equal norm in other directions showed after the last step of each attack."""
    lines = []
    without: dict[tuple[str, str], None] = {}
    controlled = set()
    for curves in measured.compared:
        attack, judge, last = curves[0].attack, curves[0].judge, last_step(curves)
        rates = {point.model: _middle(point) for point in curves if point.step == last and point.model != ALIGNED}
        mine = rates.pop(HARDENED, None)
        if not rates:
            without[attack, judge] = None
            continue
        controlled.add((attack, judge))
        where = f"After {last} steps on {plain(attack)} (judged by {plain(judge)})"
        if mine is None or None in rates.values():
            lines.append(f"{where}: the controls cannot be compared, because the judge left too much undecided.")
            continue
        as_good = {model: rate for model, rate in rates.items() if rate is not None and rate <= mine}
        listed = ", ".join(f"{plain(model)} {percent(rate)}" for model, rate in (as_good or rates).items())
        if as_good:
            lines.append(
                f"{where}, edits of the same norm in other directions did as well ({listed}; this model {percent(mine)}): that the direction of "
                "the edit is the cause is not shown."
            )
        else:
            figures = f"{listed}; this model {percent(mine)}"
            lines.append(f"{where}, every edit of the same norm in other directions had a higher ASR ({figures}); mind the intervals.")
    not_shown = "whether the *directions* of the edit matter, rather than its size, is not shown"
    if without and not controlled:
        return [f"No controls were run: {not_shown}."]
    attacks = dict.fromkeys(f"{plain(attack)} (judged by {plain(judge)})" for attack, judge in without if (attack, judge) not in controlled)
    return lines + [f"No controls were run on {attack}: {not_shown} there." for attack in attacks]


def protocol_lines(measured: Measured) -> list[str]:
    """How the attacks were run."""
    asked = dict.fromkeys((point.prompts.source, point.prompts.n) for point in measured.attacks)
    lines = [f"Measured with {n} prompts of {plain(source)}." for source, n in asked]
    for training in measured.training:
        kind = "LoRA" if training.lora else "full"
        lines.append(f"Attacks: {kind} fine-tuning in float32, learning rate {training.learning_rate:g}, batches of {training.batch_size}.")
    if any(len(point.figures) == 1 for point in measured.attacks):
        lines.append("One seed of the data's order; intervals are over prompts (Wilson 95 %), not over seeds.")
    elif measured.attacks:
        lines.append("ASR is the median over seeds of the data's order; the pair of models is the same for each.")
    return lines


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of GitHub's Markdown. Bars and line breaks inside cells are escaped; names come from files of others."""
    cells = [list(heads), ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(_cell(str(cell)) for cell in row) + " |" for row in cells)


def plain(name: str) -> str:
    """A name from a file of others, of a judge or a data set, for a sentence or a cell: one line without Markdown or HTML of its own.

    Underscores are left as they are: inside words they mean nothing, and with backslashes before them an access token in a name
    would no longer be found.
    """
    return _MARKS.sub(r"\\\g<0>", " ".join(name.split()).replace("<", "&lt;"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
