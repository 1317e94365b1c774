"""The pictures of a comparison under attack: curves against steps, and the two of the LoX paper (arXiv 2506.15606, Figs. 2 and 3)."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from lox_merge.publish.documents.robustness import ALIGNED, HARDENED, Curve, Point, Robustness
from lox_merge.publish.figures.marks import Measured, draw_with_intervals, rate_axis
from lox_merge.publish.figures.style import GREY, label, legend_below, model_style

# How a mark is filled says which attack it is of.
_FILLS = ("full", "none", "left", "bottom", "right", "top")


def draw_asr_against_steps(axes: Any, result: Robustness, attack: str, judge: str) -> None:
    """ASR against training steps, a line a model: with one seed its 95 % interval, with several the median and thin lines a seed."""

    def measured(point: Point) -> Measured:
        rate = point.attack_success.get(judge)
        return (point.step, rate.rate, rate.interval) if rate else (point.step, None, None)

    _draw_curves(axes, result, attack, measured)
    rate_axis(axes)


def draw_ratio_against_steps(axes: Any, result: Robustness, attack: str) -> None:
    """R_ft/R_align against training steps."""
    _draw_curves(axes, result, attack, lambda point: (point.step, point.r_ft_over_r_align, None))
    axes.set_ylabel("R_ft / R_align")


def draw_utility_against_steps(axes: Any, result: Robustness, attack: str, measure: str) -> None:
    """One of the utilities ('exact match', 'perplexity', 'KL') against training steps."""
    _draw_curves(axes, result, attack, lambda point: (point.step, point.utility.get(measure), None))
    if measure == "exact match":
        rate_axis(axes, "exact match (rate)")
    else:
        axes.set_ylabel("KL from aligned (nats)" if measure == "KL" else label(measure))


def _draw_curves(axes: Any, result: Robustness, attack: str, measured: Callable[[Point], Measured]) -> None:
    models, several = result.models, len(result.seeds) > 1
    reach = max(result.training.steps)
    for position, model in enumerate(models):
        curves, style = result.of(attack, model), model_style(model, position)
        # Beside each other, so that equal rates do not hide one another.
        shift = 0.008 * reach * (position - (len(models) - 1) / 2)
        if not several:
            shown = [(step + shift, value, ends) for curve in curves for step, value, ends in map(measured, curve.points)]
            draw_with_intervals(axes, shown, label=_named(model), **style)
            continue
        found: dict[int, list[float]] = {}
        for curve in curves:
            known = [(step, value) for step, value, _ in map(measured, curve.points) if value is not None]
            axes.plot([step + shift for step, _ in known], [value for _, value in known], color=style["color"], linewidth=0.6, alpha=0.6)
            for step, value in known:
                found.setdefault(int(step), []).append(value)
        steps = sorted(found)
        axes.plot([step + shift for step in steps], [median(found[step]) for step in steps], label=_named(model), **style)
    axes.set_xlabel("training steps")


def draw_degradation(axes: Any, result: Robustness, judge: str) -> None:
    """ASR after the attack minus before it, against R_ft/R_align after it: one mark a model, attack and seed (LoX, Fig. 2)."""

    def place(curve: Curve) -> tuple[float, float] | None:
        before, after = (_rate(curve, step, judge) for step in (result.training.steps[0], result.training.steps[-1]))
        last = curve.point(result.training.steps[-1])
        if before is None or after is None or last is None or last.r_ft_over_r_align is None:
            return None
        return last.r_ft_over_r_align, after - before

    _scatter(axes, result, place)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(xlabel=f"R_ft / R_align after {result.training.steps[-1]} steps", ylabel="change of ASR by the attack")


def draw_with_and_without(axes: Any, result: Robustness, judge: str) -> None:
    """ASR against R_ft after the attack, a line from aligned to LoX for each attack and seed (LoX, Fig. 3); controls beside."""

    def place(curve: Curve) -> tuple[float, float] | None:
        last, rate = curve.point(result.training.steps[-1]), _rate(curve, result.training.steps[-1], judge)
        return None if last is None or last.r_ft.mean is None or rate is None else (last.r_ft.mean, rate)

    for attack in result.attacks:
        for seed in result.seeds:
            ends = [place(curve) for model in (ALIGNED, HARDENED) for curve in result.of(attack.name, model) if curve.seed == seed]
            known = [end for end in ends if end is not None]
            if len(known) == 2:
                axes.annotate("", xy=known[1], xytext=known[0], arrowprops={"arrowstyle": "->", "color": GREY, "shrinkA": 6, "shrinkB": 6})
    _scatter(axes, result, place)
    rate_axis(axes)
    axes.set_xlabel(f"mean R_ft after {result.training.steps[-1]} steps")


def _rate(curve: Curve, step: int, judge: str) -> float | None:
    point = curve.point(step)
    found = point.attack_success.get(judge) if point else None
    return found.rate if found else None


def _scatter(axes: Any, result: Robustness, place: Callable[[Curve], tuple[float, float] | None]) -> None:
    """Colour and form of a mark say the model, its filling the attack."""
    looks = {model: _mark(model, position) for position, model in enumerate(result.models)}
    fills = {attack.name: _FILLS[position % len(_FILLS)] for position, attack in enumerate(result.attacks)}
    for curve in result.curves:
        if (point := place(curve)) is not None:
            axes.plot(*point, fillstyle=fills.get(curve.attack), **looks[curve.model])
    # Empty series for the legend: one a model, then one an attack.
    for model, look in looks.items():
        axes.plot([], [], label=_named(model), **look)
    if len(fills) > 1:
        for attack, fill in fills.items():
            axes.plot([], [], marker="s", linestyle="", color=GREY, markerfacecoloralt="none", fillstyle=fill, label=f"attack {label(attack, 24)}")
    axes.locator_params(axis="x", nbins=6)  # small changes have long tick labels


def _mark(model: str, position: int) -> dict[str, Any]:
    style = model_style(model, position)
    return {"color": style["color"], "marker": style["marker"], "markersize": 7, "linestyle": "", "markerfacecoloralt": "none"}


def _named(model: str) -> str:
    return label(model) if model in (ALIGNED, HARDENED) else f"{label(model, 24)} (control)"


def robustness_picture(result: Robustness) -> Any:
    """The picture of `robustness --plot`: one panel an attack (ASR against steps by the first judge), and last LoX's Fig. 3."""
    from matplotlib.figure import Figure

    judge, count = next(iter(result.judges)), len(result.attacks) + 1
    figure = Figure(figsize=(4.4 * count, 3.8))
    panels = figure.subplots(1, count)
    for axes, attack in zip(panels, result.attacks, strict=False):
        draw_asr_against_steps(axes, result, attack.name, judge)
        axes.set_title(label(attack.name))
    draw_with_and_without(panels[-1], result, judge)
    panels[-1].set_title(f"after {result.training.steps[-1]} steps")
    legend_below(figure)
    return figure
