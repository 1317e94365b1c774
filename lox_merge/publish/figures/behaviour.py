"""The pictures of compared expectations: KL by token, log-probabilities, reversion, next tokens."""

from __future__ import annotations

from typing import Any

from lox_merge.diagnostics.behaviour.measures import Position
from lox_merge.publish.documents.behaviour import ALIGNED, BASE, Behaviour, NextTokens, TextSet
from lox_merge.publish.figures.marks import draw_with_intervals
from lox_merge.publish.figures.style import GREY, label, legend_below, model_style

# More rows than this in one picture cannot be read.
_MOST_TOKENS, _MOST_CANDIDATES = 40, 12


def draw_divergence(axes: Any, result: Behaviour, found: TextSet) -> None:
    """KL(model ‖ base) against the place in the response, a line a model, with 95 % intervals; one scale for all sets."""
    shifts = found.kl_from_base
    for order, (name, shift) in enumerate(shifts.items()):
        # Beside each other, so that equal values do not hide one another.
        aside = 0.05 * (order - (len(shifts) - 1) / 2)
        shown = [(position.t + aside, position.kl, position.interval) for position in shift.positions[:_MOST_TOKENS]]
        draw_with_intervals(axes, shown, label=label(name), **_style(result, name))
    ends = [position.interval[1] if position.interval else position.kl for one in result.sets for position in _positions(one)]
    axes.set_ylim(-0.02 * max(ends), 1.05 * max(ends) or 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="token of the response", ylabel="KL from base (nats)")


def _positions(found: TextSet) -> list[Position]:
    return [position for shift in found.kl_from_base.values() for position in shift.positions[:_MOST_TOKENS]]


def draw_likelihoods(axes: Any, result: Behaviour, found: TextSet) -> None:
    """Log-probability of every text under aligned against every other model's: on the line both find it as probable."""
    values: list[float] = []
    for name in (name for name in result.models if name != ALIGNED):
        places = [(text.models[ALIGNED].joint, text.models[name].joint) for text in found.texts]
        values += [value for place in places for value in place]
        style = _style(result, name) | {"linestyle": "", "alpha": 0.7}
        axes.plot([x for x, _ in places], [y for _, y in places], label=label(name), **style)
    ends = [min(values), max(values)]
    axes.plot(ends, ends, color=GREY, linewidth=0.8, linestyle="--")
    axes.locator_params(nbins=6)
    axes.set(xlabel="log p under aligned (nats)", ylabel="log p under the model (nats)")


def draw_reversion(axes: Any, result: Behaviour) -> None:
    """Reversion index of every set and model with 95 % intervals; lines at 0, aligned, and 1, base. An undefined one has no mark."""
    for position, name in enumerate(result.others):
        shift = 0.16 * (position - (len(result.others) - 1) / 2)
        measured = [(row + shift, found.reversion[name].index, found.reversion[name].interval) for row, found in enumerate(result.sets)]
        draw_with_intervals(axes, measured, across=True, label=label(name), **(_style(result, name) | {"linestyle": ""}))
    for place, name in ((0, ALIGNED), (1, BASE)):
        axes.axvline(place, color=GREY, linewidth=1, linestyle="-" if place == 0 else "--")
        axes.annotate(name, (place, 1), xycoords=("data", "axes fraction"), xytext=(3, -2), textcoords="offset points", va="top", fontsize=8)
    rows = [label(found.name, 24) for found in result.sets]
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    known = [one.index for found in result.sets for one in found.reversion.values() if one.index is not None]
    low, high = axes.get_xlim()
    # A whisker that leaves the picture says enough of itself; a mark must not.
    axes.set_xlim(max(min(low, -0.1), min([0, *known]) - 1), min(max(high, 1.1), max([1, *known]) + 1))
    axes.set_xlabel("reversion index")


def draw_moved(axes: Any, result: Behaviour) -> None:
    """How much less probable than under aligned the texts became, of every set and model: what a change of style does on harmless ones."""
    for position, name in enumerate(result.others):
        shift = 0.16 * (position - (len(result.others) - 1) / 2)
        measured = [
            (row + shift, -found.reversion[name].moved, _negative(found.reversion[name].moved_interval)) for row, found in enumerate(result.sets)
        ]
        draw_with_intervals(axes, measured, across=True, label=label(name), **(_style(result, name) | {"linestyle": ""}))
    for row, found in enumerate(result.sets):
        gap = -next(iter(found.reversion.values())).gap
        axes.plot([gap], [row], marker="|", markersize=16, linestyle="", color=GREY, label="base" if row == 0 else None)
    axes.axvline(0, color=GREY, linewidth=1)
    rows = [label(found.name, 24) for found in result.sets]
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("log p minus that under aligned (nats a text)")


def draw_next_tokens(axes: Any, result: Behaviour, found: NextTokens) -> None:
    """Probability of the most probable next tokens, a bar a model."""
    shown = found.candidates[:_MOST_CANDIDATES]
    height = 0.8 / len(result.models)
    for position, name in enumerate(result.models):
        places = [row + (position - (len(result.models) - 1) / 2) * height for row in range(len(shown))]
        values = [candidate.probabilities[name] for candidate in shown]
        axes.barh(places, values, height=0.9 * height, label=label(name), color=_style(result, name)["color"])
    axes.set_yticks(range(len(shown)), [label(repr(candidate.text), 20) for candidate in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(0, 1.03)
    axes.set_xlabel("probability as the next token")


def behaviour_picture(result: Behaviour) -> Any:
    """The picture of `behaviour --plot`: KL by token of every set, the reversion, or next tokens where no set was read."""
    from matplotlib.figure import Figure

    draws: list[tuple[str, Any]] = [(found.name, lambda axes, found=found: draw_divergence(axes, result, found)) for found in result.sets]
    if result.sets and result.others:
        draws.append(("between aligned and base", lambda axes: draw_reversion(axes, result)))
    if not draws:
        draws = [(after.prefix.words, lambda axes, after=after: draw_next_tokens(axes, result, after)) for after in result.next_tokens]
    figure = Figure(figsize=(4.4 * len(draws), 3.8))
    for axes, (title, draw) in zip(figure.subplots(1, len(draws), squeeze=False)[0], draws, strict=True):
        draw(axes)
        axes.set_title(label(title))
    legend_below(figure)
    return figure


def _style(result: Behaviour, name: str) -> dict[str, Any]:
    if name == BASE:
        return {"color": GREY, "marker": "D", "linestyle": ":"}
    # The second series has aligned's colour.
    position = result.models.index(name) - 2
    return model_style(name, position + 1 if position > 0 else 0)


def _negative(ends: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if ends is None else (-ends[1], -ends[0])
