"""The picture of a demo over several seeds."""

from __future__ import annotations

from typing import Any

from lox_merge.publish.documents.demo import FullDemo
from lox_merge.publish.figures.marks import draw_with_intervals
from lox_merge.publish.figures.style import label, model_style


def draw_over_seeds(axes: Any, result: FullDemo, measure: str) -> None:
    """A measure at every stage: the median over seeds, whiskers from lowest to highest seed, a mark a model."""
    by_model = result.over_seeds[measure]
    stages = list(dict.fromkeys(stage for found in by_model.values() for stage in found))
    for position, (model, found) in enumerate(by_model.items()):
        shift = 0.13 * (position - (len(by_model) - 1) / 2)
        known = [(stages.index(stage) + shift, spread) for stage, spread in found.items() if spread is not None]
        measured = [(place, spread.median, (spread.lowest, spread.highest)) for place, spread in known]
        draw_with_intervals(axes, measured, label=label(model), **(model_style(model, position) | {"linestyle": ""}))
    axes.set_xticks(range(len(stages)), [label(stage, 18).replace(" ", "\n", 1) for stage in stages])
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel(label(measure))
