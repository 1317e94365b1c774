"""The pictures of measured attack success: rates with intervals, and paired differences."""

from __future__ import annotations

from typing import Any

from lox_merge.publish.documents.attack_success import AttackSuccess
from lox_merge.publish.documents.shape import PairedChange
from lox_merge.publish.figures.marks import draw_with_intervals
from lox_merge.publish.figures.style import GREY, label, series_style


def draw_rates(axes: Any, result: AttackSuccess) -> None:
    """ASR of every model, a mark a judge, with Wilson 95 % intervals."""
    judges = list(dict.fromkeys(judge for evaluation in result.evaluations for judge in evaluation.attack_success))
    for position, judge in enumerate(judges):
        shift = 0.14 * (position - (len(judges) - 1) / 2)
        found = [(row + shift, evaluation.attack_success.get(judge)) for row, evaluation in enumerate(result.evaluations)]
        measured = [(row, rate.rate, rate.interval) for row, rate in found if rate is not None]
        draw_with_intervals(axes, measured, across=True, label=f"judge {label(judge, 30)}", **_mark(position))
    _name_rows(axes, [evaluation.title for evaluation in result.evaluations])
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("attack success rate (ASR)")


def draw_differences(axes: Any, result: AttackSuccess) -> None:
    """ASR minus the first model's on the same prompts, with Tango 95 % intervals; the line at 0 is no difference."""
    judges = list(dict.fromkeys(comparison.judge for comparison in result.comparisons))
    models = list(dict.fromkeys(comparison.second for comparison in result.comparisons))
    for position, judge in enumerate(judges):
        shift = 0.14 * (position - (len(judges) - 1) / 2)
        measured = [(models.index(one.second) + shift, one.difference, one.interval) for one in _of(result, judge)]
        draw_with_intervals(axes, measured, across=True, label=f"judge {label(judge, 30)}", **_mark(position))
    axes.axvline(0, color=GREY, linewidth=1)
    _name_rows(axes, models)
    axes.set_xlabel(f"ASR minus that of {label(result.comparisons[0].first, 24)}, paired")


def _of(result: AttackSuccess, judge: str) -> list[PairedChange]:
    return [comparison for comparison in result.comparisons if comparison.judge == judge]


def _mark(position: int) -> dict[str, Any]:
    return series_style(position) | {"linestyle": ""}


def _name_rows(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [label(name, 22) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
