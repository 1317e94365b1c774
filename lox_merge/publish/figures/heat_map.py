"""Heat maps of layer × module: where in a model a figure is high and where it is low."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lox_merge.publish.figures.style import RULE, label

# Single numbers fit into cells up to this many layers.
_NUMBERED_LAYERS = 10
# A stack this long is drawn with that many tick labels.
_TICKS = 24


@dataclass(frozen=True)
class Grid:
    """values: (layer, module) to a value; a module in a layer has none where it is undefined or not there."""

    layers: tuple[int, ...]
    modules: tuple[str, ...]
    values: Mapping[tuple[int, str], float]


def place_of(name: str) -> tuple[str, int, str] | None:
    """Stack, layer and module of a tensor's name: 'model.layers.3.mlp.up_proj.weight' is 'model.layers', 3, 'mlp.up_proj'.

    Experts are one module: their numbers become '*'. None outside the layers.
    """
    found = re.match(r"(.*?)\.?(?<![^.])(\d+)\.(.+)", name)
    if not found:
        return None
    module = re.sub(r"\.\d+(?=\.|$)", ".*", re.sub(r"\[\d+\]", "[*]", found[3]))
    return found[1], int(found[2]), re.sub(r"\.weight(?=\[|$)", "", module)


def grid_of(values: Iterable[tuple[str, float | None]]) -> Grid:
    """Named values as a grid: means where several matrices share a place, as experts do. What is undefined is left out.

    Where a model has several stacks, as encoder and decoder, a module's name begins with its stack's.
    """
    placed = [(place, value) for name, value in values if (place := place_of(name)) is not None]
    stacks = {stack for (stack, _, _), _ in placed}
    found: dict[tuple[int, str], list[float]] = {}
    for (stack, layer, module), value in placed:
        known = found.setdefault((layer, f"{stack} {module}" if len(stacks) > 1 else module), [])
        if value is not None:
            known.append(value)
    return Grid(
        layers=tuple(sorted({layer for layer, _ in found})),
        modules=tuple(dict.fromkeys(module for _, module in found)),
        values={place: math.fsum(known) / len(known) for place, known in found.items() if known},
    )


def heat_map(grid: Grid, quantity: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A figure of the grid: modules down, layers across, hatched where there is no value. low, high: ends of the colours.

    quantity: what the colour bar says.
    """
    import numpy
    from matplotlib.figure import Figure

    table = numpy.full((len(grid.modules), len(grid.layers)), numpy.nan)
    for (layer, module), value in grid.values.items():
        table[grid.modules.index(module), grid.layers.index(layer)] = value
    columns, rows = max(len(grid.layers), 1), max(len(grid.modules), 1)
    figure: Any = Figure(figsize=(min(10.0, 3.0 + 0.42 * max(columns, 4)), 1.3 + 0.3 * max(rows, 3)))
    axes = figure.subplots()
    known = [value for value in grid.values.values() if math.isfinite(value)]
    limits = (low if low is not None else min(known, default=0.0), high if high is not None else max(known, default=1.0))
    if limits[0] == limits[1]:  # one value has no range of colours
        limits = (limits[0] - 0.5, limits[1] + 0.5)
    _paint(axes, table, limits, quantity)
    every = math.ceil(columns / _TICKS)
    axes.set_xticks([position + 0.5 for position in range(0, columns, every)], [str(layer) for layer in grid.layers[::every]])
    axes.set_yticks([position + 0.5 for position in range(len(grid.modules))], [label(module, 30) for module in grid.modules])
    axes.set_xlabel("layer")
    return figure


def draw_matrix(axes: Any, values: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], quantity: str) -> None:
    """A table of numbers between 0 and 1 with its colour bar, names down and across; hatched where there is none. quantity: of the bar."""
    import numpy

    table = numpy.array([[numpy.nan if value is None else value for value in row] for row in values], dtype=float).reshape(len(rows), len(columns))
    _paint(axes, table, (0.0, 1.0), quantity)
    # Names side by side would run into each other.
    slanted = {"rotation": 30, "ha": "right"} if max(map(len, columns), default=0) > 4 else {}
    axes.set_xticks([place + 0.5 for place in range(len(columns))], [label(name, 20) for name in columns], **slanted)
    axes.set_yticks([place + 0.5 for place in range(len(rows))], [label(name, 20) for name in rows])


def _paint(axes: Any, table: Any, limits: tuple[float, float], quantity: str) -> None:
    """Cells in colours between the limits, numbers in them where there is room, and the colour bar."""
    import matplotlib
    import numpy
    from matplotlib.patches import Rectangle

    levels = matplotlib.colormaps["cividis"].resampled(64)  # the bar has a shape for each of them
    mesh = axes.pcolormesh(numpy.ma.masked_invalid(table), cmap=levels, vmin=limits[0], vmax=limits[1], edgecolors="face", linewidth=0.4)
    for row, column in numpy.argwhere(~numpy.isfinite(table)):
        axes.add_patch(Rectangle((column, row), 1, 1, hatch="////", fill=False, edgecolor=RULE, linewidth=0))
    if table.shape[1] <= _NUMBERED_LAYERS:
        _write_numbers(axes, table, mesh.norm)
    axes.grid(False)
    axes.invert_yaxis()
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.set_label(quantity, labelpad=8)
    bar.outline.set_visible(False)
    bar.solids.set(edgecolor="face", rasterized=False)


def _write_numbers(axes: Any, table: Any, norm: Callable[[float], float]) -> None:
    for (row, column), value in _known(table):
        # cividis is dark below its middle, on any background of the page.
        ink = "#ffffff" if norm(value) < 0.55 else "#000000"
        axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)


def _known(table: Any) -> list[tuple[tuple[int, int], float]]:
    import numpy

    return [((int(row), int(column)), float(table[row, column])) for row, column in numpy.argwhere(numpy.isfinite(table))]
