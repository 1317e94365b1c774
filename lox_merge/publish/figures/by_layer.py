"""A figure by layer, a line for each kind of module, above what a random subspace would give."""

from __future__ import annotations

from typing import Any

from lox_merge.publish.figures.heat_map import Grid
from lox_merge.publish.figures.style import GREY, label, series_style


def draw_by_layer(axes: Any, grid: Grid, expected: Grid | None, quantity: str) -> None:
    """grid's modules as lines over layers. expected: what a random subspace of the same rank gives there; its range is shaded."""
    for position, module in enumerate(grid.modules):
        known = [(layer, grid.values[layer, module]) for layer in grid.layers if (layer, module) in grid.values]
        axes.plot([layer for layer, _ in known], [value for _, value in known], label=label(module, 24), **series_style(position))
    by_layer = {layer: [value for (at, _), value in expected.values.items() if at == layer] for layer in grid.layers} if expected else {}
    layers = [layer for layer, values in by_layer.items() if values]
    if layers:
        low, high = ([end(by_layer[layer]) for layer in layers] for end in (min, max))
        axes.fill_between(layers, low, high, color=GREY, alpha=0.35, linewidth=1.5, label="random subspace (range)")
    axes.set_xlabel("layer")
    axes.set_ylabel(quantity)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
