"""The pictures of what weights say, each with what random subspaces of the same rank give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lox_merge.diagnostics.results import AlignedGroup, Findings, Group, Overlap, Statistic
from lox_merge.publish.documents.shape import Interval
from lox_merge.publish.figures.style import BLUE, GREY, PURPLE, label, series_style

Measured = tuple[float | None, float | None, Interval | None]
"""A value, what chance gives, and 95 % of what chance gives."""


def draw_energy_kept(axes: Any, group: AlignedGroup) -> None:
    """Energy kept against the share of directions: the leading ones, as many at random, random subspaces; bands are 95 % of draws."""
    looks: tuple[tuple[str, str, str, str], ...] = (
        ("top", "leading directions", BLUE, "s"),
        ("random_k", "directions of Δ_align at random", PURPLE, "v"),
        ("random", "random subspace", GREY, "D"),
    )
    for name, words, color, marker in looks:
        found: list[tuple[float, Statistic]] = [(one.fraction, getattr(one, name)) for one in group.energy_kept]
        known = [(fraction, one.mean) for fraction, one in found if one.mean is not None]
        style = {"linestyle": "-" if name == "top" else "--", "linewidth": 2.8 if name == "top" else 1.4, "marker": marker, "color": color}
        axes.plot([fraction for fraction, _ in known], [mean for _, mean in known], label=words, **style)
        if name != "top":
            _band(axes, [(fraction, one.band) for fraction, one in found], color)
    axes.set_xlabel("share of the short side's directions")
    axes.set_ylabel("energy kept (share of ‖Δ‖²)")
    axes.set_xlim(left=0)
    axes.set_ylim(-0.03, 1.03)


def draw_overlaps(axes: Any, result: Findings) -> None:
    """MSO against eta: every fine-tuned model with alignment, and every two of them; thin dashes are what random subspaces give."""
    group, labels = result.averaged, result.labels
    series: list[tuple[str, Sequence[Overlap]]] = [
        (f"alignment, {label(name, 16)}", one.mso) for name, one in zip(labels, group.finetuned, strict=True)
    ]
    series += [(f"{label(labels[pair.first], 14)}, {label(labels[pair.second], 14)}", pair.mso) for pair in group.pairs]
    for position, (words, overlaps) in enumerate(series):
        style = series_style(position)
        known = [(one.eta, one.mean) for one in overlaps if one.mean is not None]
        axes.plot([eta for eta, _ in known], [mean for _, mean in known], label=words, **style)
        chance = [(one.eta, one.expected) for one in overlaps if one.expected is not None]
        axes.plot([eta for eta, _ in chance], [value for _, value in chance], color=style["color"], linestyle=(0, (2, 2)), linewidth=0.9)
    axes.plot([], [], color=GREY, linestyle=(0, (2, 2)), linewidth=0.9, label="random subspaces")
    axes.set_xlabel("energy η that the subspaces hold")
    axes.set_ylabel("overlap (MSO)")
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.03, 1.03)


def draw_r_by_layer(axes: Any, result: Findings) -> None:
    """R_align by layer, and R_ft of every fine-tuned model; chance is that of R_align."""
    series = [("R_align", lambda group: _measured(group.aligned.r))]
    series += [(f"R_ft {label(name, 20)}", _of_finetuned(place, "r")) for place, name in enumerate(result.labels)]
    _by_layer(axes, result.layers, series, "R")
    axes.set_ylim(bottom=0)


def draw_ratio_by_layer(axes: Any, result: Findings) -> None:
    """R_ft/R_align by layer; chance is that of the first fine-tuned model."""
    series = [(label(name, 24), _of_finetuned(place, "ratio")) for place, name in enumerate(result.labels)]
    _by_layer(axes, result.layers, series, "R_ft / R_align")


def draw_angle_by_layer(axes: Any, result: Findings) -> None:
    """cos of the fine-tuning change with −Δ_align by layer: 1 walks straight back, 0 is unrelated, −1 goes further."""

    def angle(place: int) -> Callable[[Group], Measured]:
        return lambda group: (group.finetuned[place].cosines.safety_angle, 0.0, group.finetuned[place].cosines.band)

    _by_layer(axes, result.layers, [(label(name, 24), angle(place)) for place, name in enumerate(result.labels)], "cosine with −Δ_align")


def _measured(statistic: Statistic) -> Measured:
    return statistic.mean, statistic.expected, statistic.band


def _of_finetuned(place: int, name: str) -> Callable[[Group], Measured]:
    return lambda group: _measured(getattr(group.finetuned[place], name))


def _by_layer(axes: Any, layers: Sequence[Group], series: Sequence[tuple[str, Callable[[Group], Measured]]], quantity: str) -> None:
    for position, (words, measured) in enumerate(series):
        known = [(place, value) for place, group in enumerate(layers) if (value := measured(group)[0]) is not None]
        axes.plot([place for place, _ in known], [value for _, value in known], label=words, **series_style(position))
    chance = [(place, measured_) for place, group in enumerate(layers) if (measured_ := series[0][1](group))[1] is not None]
    axes.plot([place for place, _ in chance], [one[1] for _, one in chance], color=GREY, linestyle="--", linewidth=1, label="random (95 % band)")
    _band(axes, [(place, one[2]) for place, one in chance], GREY)
    every = max(1, -(-len(layers) // 12))
    axes.set_xticks(range(0, len(layers), every), [_short(group.name) for group in layers][::every])
    axes.set_xlabel("layer")
    axes.set_ylabel(quantity)


def _short(layer: str) -> str:
    """The number of 'model.layers.3'; the whole name where it ends in none."""
    return layer.rpartition(".")[2] if layer.rpartition(".")[2].isdigit() else label(layer, 12)


def _band(axes: Any, bands: Sequence[tuple[float, Interval | None]], color: str) -> None:
    known = [(place, band) for place, band in bands if band is not None]
    axes.fill_between(
        [place for place, _ in known], [low for _, (low, _) in known], [high for _, (_, high) in known], color=color, alpha=0.2, linewidth=0
    )
