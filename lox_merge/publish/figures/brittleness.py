"""The pictures of a brittleness probe: ASR and utility against the number of directions taken away."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import Any

from lox_merge.publish.documents.brittleness import Brittleness, RemovalPoint
from lox_merge.publish.figures.marks import draw_with_intervals, rate_axis
from lox_merge.publish.figures.style import GREY, PURPLE, VERMILLION, label, legend_below

_LOOKS: dict[str, dict[str, Any]] = {
    "random": {"color": GREY, "marker": "D", "linestyle": ":"},
    "random-subspace": {"color": PURPLE, "marker": "v", "linestyle": "-."},
}
# Utilities beside ASR in one picture; a task of lm-eval has a dozen metrics.
_BESIDE = 2


def draw_asr_against_directions(axes: Any, result: Brittleness) -> None:
    """ASR by directions taken away: the leading ones with their intervals, of random ones the mean and range over draws."""
    leading = [
        (0, result.aligned.rate, result.aligned.interval),
        *((point.rank, point.attack.rate, point.attack.interval) for point in result.leading),
    ]
    _draw_controls(axes, result, result.aligned.rate, lambda point: point.attack.rate)
    draw_with_intervals(axes, leading, marker="o", color=VERMILLION, label="leading directions")
    if result.aligned.rate is not None:
        axes.axhline(result.aligned.rate, color=GREY, linewidth=0.8)
    rate_axis(axes)
    _rank_axis(axes)


def draw_utility_against_directions(axes: Any, result: Brittleness, measure: str) -> None:
    """One utility of the same models."""
    before = result.aligned_utility.get(measure)
    _draw_controls(axes, result, before, lambda point: point.utility.get(measure))
    known = [
        (rank, value) for rank, value in [(0, before), *((point.rank, point.utility.get(measure)) for point in result.leading)] if value is not None
    ]
    axes.plot([rank for rank, _ in known], [value for _, value in known], marker="o", color=VERMILLION, label="leading directions")
    if known and all(0 <= value <= 1 for _, value in known) and measure != "KL":
        axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("KL from aligned (nats)" if measure == "KL" else label(measure))
    _rank_axis(axes)


def _draw_controls(axes: Any, result: Brittleness, before: float | None, value_of: Callable[[RemovalPoint], float | None]) -> None:
    for control in result.controls:
        found = {0: [before]} | {rank: [value_of(point) for point in result.drawn(control, rank)] for rank in result.ranks[1:]}
        known = {rank: values for rank, each in found.items() if (values := [value for value in each if value is not None])}
        look = _LOOKS.get(control, {})
        axes.fill_between(
            list(known), [min(values) for values in known.values()], [max(values) for values in known.values()], alpha=0.25, color=look.get("color")
        )
        axes.plot(list(known), [mean(values) for values in known.values()], label=f"{label(control)}, mean and range of {result.draws}", **look)


def _rank_axis(axes: Any) -> None:
    axes.set_xlabel("directions k taken away")
    axes.xaxis.get_major_locator().set_params(integer=True)


def brittleness_picture(result: Brittleness) -> Any:
    """The picture of `brittleness --plot`: ASR, and the first utilities beside it."""
    from matplotlib.figure import Figure

    measures = list(result.aligned_utility)[:_BESIDE]
    figure = Figure(figsize=(5.2 + 3.9 * len(measures), 3.8))
    panels = figure.subplots(1, 1 + len(measures), squeeze=False)[0]
    draw_asr_against_directions(panels[0], result)
    for axes, measure in zip(panels[1:], measures, strict=True):
        draw_utility_against_directions(axes, result, measure)
    legend_below(figure)
    return figure
