"""The picture of two framings: how alike the losses and the gradients of the same completions are."""

from __future__ import annotations

from typing import Any

from lox_merge.publish.documents.framing import Framing, Mean, ModelCosines
from lox_merge.publish.figures.marks import draw_with_intervals
from lox_merge.publish.figures.style import BLUE, GREEN, GREY, INK, ORANGE, VERMILLION, label

_MARKS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("loss", "losses", {"color": ORANGE, "marker": "^"}),
    ("shuffled", "losses in random order (chance)", {"color": GREY, "marker": "x"}),
    ("centred", "centred losses", {"color": GREEN, "marker": "v"}),
    ("other_centred", "centred losses, other completion", {"color": GREY, "marker": "+"}),
    ("gradient", "gradients, same completion", {"color": BLUE, "marker": "s"}),
    ("other_completion", "gradients, other completion", {"color": GREY, "marker": "D", "markerfacecolor": "none"}),
)


def draw_framing(axes: Any, result: Framing) -> None:
    """Mean cosines with bootstrap 95 % intervals, a row a model; stars are the cosines of the data sets' mean gradients."""
    for position, (name, text, style) in enumerate(_MARKS):
        shift = 0.13 * (position - (len(_MARKS) - 1) / 2)
        measured = [(row + shift, found.mean, found.interval) for row, found in enumerate(_of(result, name))]
        draw_with_intervals(axes, measured, across=True, label=text, linestyle="", **style)
    known = [(model.mean_gradient, row + 0.45) for row, model in enumerate(result.models) if model.mean_gradient is not None]
    axes.plot([x for x, _ in known], [y for _, y in known], marker="*", markersize=10, linestyle="", color=VERMILLION, label="mean gradients")
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(result.models)), [label(model.model, 22) for model in result.models])
    axes.set_ylim(len(result.models) - 0.4, -0.5)
    axes.set_xlim(-1.05, 1.05)
    axes.set_xlabel("cosine between the two framings")


def draw_pairs(axes: Any, model: ModelCosines) -> None:
    """Every pair: centred cosine of its losses against the cosine of its gradients."""
    known = [(pair.centred, pair.gradient) for pair in model.pairs if pair.centred is not None and pair.gradient is not None]
    axes.plot([x for x, _ in known], [y for _, y in known], marker="o", linestyle="", alpha=0.6, color=BLUE, label="one completion")
    axes.axhline(0, color=INK, linewidth=1)
    axes.axvline(0, color=INK, linewidth=1)
    axes.axhspan(-model.band, model.band, color=GREY, alpha=0.35, label="random directions (95 %)")
    axes.set_xlim(-1.05, 1.05)
    axes.set_ylim(-1.05, 1.05)
    axes.set_xlabel("centred cosine of the losses")
    axes.set_ylabel("cosine of the gradients")


def _of(result: Framing, name: str) -> list[Mean]:
    return [getattr(model, name) for model in result.models]
