"""Pictures of a landscape: ASR along lines, and over planes as contours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lox_merge.publish.documents.landscape import Landscape, Slice
from lox_merge.publish.figures.marks import draw_with_intervals, rate_axis
from lox_merge.publish.figures.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RULE,
    SKY,
    VERMILLION,
    label,
    legend_below,
    series_style,
    single_panel,
)

_UTILITY = (ORANGE, GREEN, PURPLE, SKY)
_LEVELS = [step / 10 for step in range(11)]


def landscape_figure(landscape: Landscape, judge: str) -> Any:
    """Everything as one figure: a panel for the lines and one for each plane."""
    if not landscape.planes:
        return single_panel(lambda axes: draw_lines(axes, landscape, judge), width=6.4, height=4.0)
    from matplotlib.figure import Figure

    panels = len(landscape.planes)
    figure = Figure(figsize=(5.6 * panels, 4.6))
    for axes, plane in zip(figure.subplots(1, panels, squeeze=False)[0], landscape.planes, strict=True):
        draw_plane(axes, landscape, plane, judge)
    legend_below(figure)
    return figure


def plane_figure(landscape: Landscape, plane: Slice, judge: str, measure: str | None = None) -> Any:
    """One plane as a figure: ASR, or a measure of utility that is a rate."""
    return single_panel(lambda axes: draw_plane(axes, landscape, plane, judge, measure), width=5.6, height=4.6)


def draw_lines(axes: Any, landscape: Landscape, judge: str) -> None:
    """ASR along every line: random directions thin and their mean bold; towards a model with whiskers; utility that is a rate dashed."""
    random = [line for line in landscape.lines if line.random]
    named = [line for line in landscape.lines if not line.random]
    for position, line in enumerate(named):
        measured = [
            (point.at[0], point.rate(judge), point.attack_success[judge].interval if judge in point.attack_success else None) for point in line.points
        ]
        draw_with_intervals(axes, measured, marker="o", color=VERMILLION, label=label(f"ASR {line.label}, 95 % interval", 60))
        _draw_marks(axes, line, position)
    for number, line in enumerate(random):
        known = [(point.at[0], rate) for point in line.points if (rate := point.rate(judge)) is not None]
        kind = "controls of the same norm" if any(one.scaled_to for one in line.directions) else "single random directions"
        axes.plot(*_columns(known), color=GREY if named else BLUE, linewidth=0.9, alpha=0.7, label=f"ASR, {kind}" if not number else None)
    if random:
        mean = _mean({line.label: {point.at[0]: point.rate(judge) for point in line.points} for line in random})
        whose = "controls" if named else "random directions"
        axes.plot(*_columns(mean), color=INK if named else BLUE, linewidth=2.6, label=f"ASR, mean over {whose}")
    for position, measure in enumerate(rates_of_utility(landscape)):
        curves = {line.label: {point.at[0]: point.utility.get(measure) for point in line.points} for line in (named or random)}
        axes.plot(
            *_columns(_mean(curves)), linestyle="--", color=_UTILITY[position % len(_UTILITY)], label=label(f"{measure}{'' if named else ', mean'}")
        )
    _draw_undefined(axes, landscape.lines, judge)
    rate_axis(axes, "rate")
    axes.set_xlabel("coordinate a along the direction (0: the model itself)")


def draw_plane(axes: Any, landscape: Landscape, plane: Slice, judge: str, measure: str | None = None) -> None:
    """ASR (or a rate of utility) as filled contours between measured points (dots), undefined cells hatched, models marked."""
    import matplotlib
    import numpy
    from matplotlib.patches import Rectangle

    first, second = plane.axes
    rates = numpy.full((len(second), len(first)), numpy.nan)
    for point in plane.points:
        rate = point.rate(judge) if measure is None else point.utility.get(measure)
        if rate is not None:
            rates[second.index(point.at[1]), first.index(point.at[0])] = rate
    colours = matplotlib.colormaps["cividis"](numpy.linspace(0, 1, len(_LEVELS) - 1))
    known = numpy.ma.masked_invalid(rates)
    if min(rates.shape) > 1 and known.count():
        # no light seams between bands in SVG and PDF
        axes.contourf(first, second, known, levels=_LEVELS, colors=colours).set_edgecolor("face")
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), matplotlib.colors.ListedColormap(colours))
    bar = axes.figure.colorbar(scale, ax=axes, pad=0.02, ticks=_LEVELS[::2])
    bar.set_label(f"ASR ({label(judge, 24)})" if measure is None else label(measure))
    bar.outline.set_visible(False)
    axes.scatter(*zip(*((point.at[0], point.at[1]) for point in plane.points), strict=True), s=4, color=RULE, linewidths=0)
    width, height = (first[-1] - first[0]) / (len(first) - 1), (second[-1] - second[0]) / (len(second) - 1)
    for row, column in numpy.argwhere(numpy.isnan(rates)):
        corner = first[column] - width / 2, second[row] - height / 2
        axes.add_patch(Rectangle(corner, width, height, hatch="////", fill=False, edgecolor=GREY, linewidth=0))
    axes.plot([0], [0], marker="*", markersize=13, linestyle="", color="white", markeredgecolor=INK, label=label(landscape.title))
    for number, mark in enumerate(plane.marks):
        style = series_style(number) | {"linestyle": "", "markersize": 9, "markeredgecolor": "white"}
        off = "" if mark.off_plane is None or mark.off_plane < 0.01 else f" ({100 * mark.off_plane:.0f} % off the plane)"
        axes.plot([mark.coordinates[0]], [mark.coordinates[1]], label=label(f"{mark.label}{off}", 48), **style)
    axes.grid(False)
    _include(axes, plane)
    axes.set_xlabel(f"a: {label(plane.directions[0].label)}")
    axes.set_ylabel(f"b: {label(plane.directions[1].label)}")


def _include(axes: Any, plane: Slice) -> None:
    """The measured grid and no more: a mark far outside would leave it a dot."""
    (left, *_, right), (low, *_, high) = plane.axes
    axes.set_xlim(left - 0.03 * (right - left), right + 0.03 * (right - left))
    axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))


def _draw_marks(axes: Any, line: Slice, position: int) -> None:
    axes.axvline(0, color=RULE, linewidth=1)
    low, high = line.axes[0][0], line.axes[0][-1]
    for number, mark in enumerate(line.marks):
        if low <= mark.coordinates[0] <= high:
            off = "" if mark.off_plane is None or mark.off_plane < 0.01 else f" ({100 * mark.off_plane:.0f} % off the line)"
            style = series_style(1 + position + number)
            axes.axvline(mark.coordinates[0], color=style["color"], linestyle=":", label=label(f"{mark.label}{off}", 48))


def _draw_undefined(axes: Any, lines: list[Slice], judge: str) -> None:
    places = sorted({point.at[0] for line in lines for point in line.points if point.rate(judge) is None})
    if places:
        axes.plot(places, [0.0] * len(places), marker="x", linestyle="", color=INK, label="undefined", clip_on=False)


def rates_of_utility(landscape: Landscape) -> list[str]:
    """Measures that are rates at every point, as the axis of ASR is."""
    found = []
    for measure in landscape.anchor.utility:
        values = [value for one in landscape.slices for point in one.points if (value := point.utility.get(measure)) is not None]
        if measure not in ("KL", "perplexity") and values and min(values) >= 0 and max(values) <= 1:
            found.append(measure)
    return found


def _mean(curves: Mapping[str, Mapping[float, float | None]]) -> list[tuple[float, float]]:
    """Mean over curves where all of them are defined: a mean over fewer would jump where one ends."""
    places = sorted({at for curve in curves.values() for at in curve})
    found = []
    for at in places:
        values = [value for curve in curves.values() if (value := curve.get(at)) is not None]
        if values and len(values) == len(curves):
            found.append((at, sum(values) / len(values)))
    return found


def _columns(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [place for place, _ in pairs], [value for _, value in pairs]
