"""Pictures of curvature: Fisher spectra, where fine-tuning overlaps with them, and what data sets are predicted to do."""

from __future__ import annotations

import math
from typing import Any

from lox_merge.publish.documents.curvature import Curvature, DataCondition, FinetunedOverlap
from lox_merge.publish.figures.heat_map import Grid, grid_of
from lox_merge.publish.figures.spectra import Spectrum, draw_spectra
from lox_merge.publish.figures.style import GREY, label, legend_below, series_style

# More kinds of modules than there are line styles would be told apart by nobody.
_KINDS = 7
_TIMES = 40
_TICKS = 5


def draw_fisher_spectra(axes: Any, result: Curvature) -> None:
    """Eigenvalues by index, a line for each kind of module with its range over layers; the strongest kinds only."""
    kinds: dict[str, list[Spectrum]] = {}
    traces: dict[str, float] = {}
    for parameter in result.parameters:
        if parameter.layer is not None and parameter.eigenvalues:
            kinds.setdefault(parameter.kind, []).append(list(enumerate(parameter.eigenvalues, 1)))
            traces[parameter.kind] = traces.get(parameter.kind, 0.0) + parameter.trace
    strongest = sorted(kinds, key=lambda kind: -traces[kind])[:_KINDS]
    draw_spectra(axes, {kind: kinds[kind] for kind in kinds if kind in strongest}, unit="eigenvalue of F")
    axes.set_xlabel("index of the eigenvalue")


def draw_layer_spectra(axes: Any, result: Curvature) -> None:
    """Eigenvalues of each layer's joint Fisher matrix, dark to light from the first layer to the last."""
    import matplotlib

    colours = matplotlib.colormaps["cividis"].resampled(max(2, len(result.layers)))
    for place, layer in enumerate(result.layers):
        values = [value for value in layer.eigenvalues if value > 0]
        named = label(f"layer {layer.layer}", 24) if place in (0, len(result.layers) - 1) or len(result.layers) <= _KINDS else None
        axes.plot(range(1, len(values) + 1), values, color=colours(place), linewidth=1.4, label=named)
    _logarithmic(axes, "y")
    axes.set_xlabel("index of the eigenvalue")
    axes.set_ylabel("eigenvalue of F")
    axes.xaxis.get_major_locator().set_params(integer=True)


def overlap_grid(model: FinetunedOverlap) -> Grid:
    """log10 of the score over a random change's, by layer and module."""
    return grid_of((entry.name, math.log10(entry.ratio) if entry.ratio else None) for entry in model.parameters)


def draw_overlap_by_layer(axes: Any, result: Curvature) -> None:
    """Overlap score over a random change's, each layer's parameters together, a line for each model."""
    for position, model in enumerate(result.finetuned):
        places = {parameter.name: parameter.layer for parameter in result.parameters}
        sums: dict[int, list[float]] = {}
        for entry in model.parameters:
            layer = places.get(entry.name)
            if layer is not None:
                found = sums.setdefault(layer, [0.0, 0.0])
                found[0], found[1] = found[0] + entry.score, found[1] + entry.expected
        known = [(layer, score / expected) for layer, (score, expected) in sorted(sums.items()) if score > 0 and expected > 0]
        axes.plot([layer for layer, _ in known], [ratio for _, ratio in known], label=label(model.name), **series_style(position))
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1.2, label="random change of equal norms")
    _logarithmic(axes, "y")
    axes.set_xlabel("layer")
    axes.set_ylabel("overlap score / random")
    axes.xaxis.get_major_locator().set_params(integer=True)


def draw_predictions(axes: Any, result: Curvature) -> None:
    """Predicted loss of safe log-likelihood against t, with 95 % intervals; dashed: by the coupling alone, which grows as t⁴."""
    for position, data in enumerate(result.ranked):
        if data.coupling is None or data.coupling.value is None:
            continue
        style = series_style(position) | {"linestyle": "-"}
        times = [point.time for point in data.predictions]
        axes.plot(times, [point.second_order_loss.value for point in data.predictions], label=label(data.name), **style)
        ends = [point.second_order_loss.interval for point in data.predictions]
        if all(interval is not None for interval in ends):
            known = [interval for interval in ends if interval is not None]
            axes.fill_between(times, [low for low, _ in known], [high for _, high in known], color=style["color"], alpha=0.15, linewidth=0)
        curve = [times[0] * (times[-1] / times[0]) ** (step / _TIMES) for step in range(_TIMES + 1)]
        axes.plot(curve, [data.coupling.value**2 * time**4 / 8 for time in curve], color=style["color"], linestyle="--", linewidth=1)
    _logarithmic(axes, "x")
    _logarithmic(axes, "y")
    times = [point.time for point in result.data[0].predictions]
    axes.set_xticks(times[:: -(-len(times) // _TICKS)])
    axes.set_xlabel("t = learning rate × steps")
    axes.set_ylabel("predicted loss (nats)")


def draw_couplings(axes: Any, result: Curvature) -> None:
    """γ of each data set with its interval, beside a random ∇g·g of its norm and the Hessian times a random gradient."""
    ranked: list[DataCondition] = [data for data in result.ranked if data.coupling is not None and data.coupling.value is not None]
    for place, data in enumerate(ranked):
        assert data.coupling is not None and data.coupling.value is not None
        style = series_style(0)
        axes.plot([data.coupling.value], [place], color=style["color"], marker="s", linestyle="", label="coupling γ" if not place else None)
        if data.coupling.interval is not None:
            axes.plot(data.coupling.interval, [place, place], color=style["color"], linewidth=1.6)
        for value, marker, name in (
            (data.expected_coupling, "|", "random vector of the same norm"),
            (data.control_coupling, "x", "same Hessian, random gradient"),
        ):
            if value:
                axes.plot([value], [place], color=GREY, marker=marker, markersize=8, linestyle="", label=name if not place else None)
    _logarithmic(axes, "x")
    axes.set_yticks(range(len(ranked)), [label(data.name, 24) for data in ranked])
    axes.set_ylim(len(ranked) - 0.5, -0.5)
    axes.set_xlabel("‖F^½ P ∇g·g‖")


def _logarithmic(axes: Any, which: str) -> None:
    """Powers of ten as plain numbers: the house style draws no formulas."""
    from matplotlib.ticker import NullFormatter

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def curvature_picture(result: Curvature) -> Any:
    """A figure of what was measured: spectra, and overlaps and predictions where there are any."""
    from matplotlib.figure import Figure

    panels: list[tuple[str, Any]] = [("Fisher spectra", draw_fisher_spectra)]
    panels += [("Overlap of fine-tuned models", draw_overlap_by_layer)] if result.finetuned else []
    panels += [("Predicted loss of safety", draw_predictions)] if any(data.coupling for data in result.data) else []
    figure = Figure(figsize=(4.4 * len(panels), 3.2))
    for axes, (title, draw) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, result)
        axes.set_title(title)
    legend_below(figure)
    return figure
