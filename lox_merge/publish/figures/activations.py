"""The pictures of compared hidden states: positions and separations by layer, agreement of domains, overlaps of prompt sets."""

from __future__ import annotations

from typing import Any

from lox_merge.publish.documents.activations import ALIGNED, BASE, Activations, Agreement, Domain, SetOverlap
from lox_merge.publish.figures.heat_map import draw_matrix
from lox_merge.publish.figures.marks import draw_with_intervals
from lox_merge.publish.figures.style import GREY, label, legend_below, model_style, series_style


def draw_positions(axes: Any, result: Activations, domain: Domain) -> None:
    """Cross-validated position of every model by layer with 95 % intervals; lines at 0, base, and 1, aligned. Undefined ones have no mark."""
    for place, name in enumerate(result.others):
        aside = 0.06 * (place - (len(result.others) - 1) / 2)
        found = [(layer.layer + aside, layer.models[name].cross_validated) for layer in domain.layers]
        draw_with_intervals(axes, [(x, one.value, one.interval) for x, one in found], label=label(name), **_style(name, place))
    for height, name in ((0, BASE), (1, ALIGNED)):
        axes.axhline(height, color=GREY, linewidth=1, linestyle="--" if height == 0 else "-")
        axes.annotate(name, (1, height), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points", ha="right", fontsize=8)
    axes.margins(y=0.08)  # a mark at the upper edge would be cut
    _layers(axes)
    axes.set_ylabel("position (0 base, 1 aligned)")


def draw_separation(axes: Any, domain: Domain) -> None:
    """s_aligned − s_base by layer, in sample and cross-validated, beside swapped labels and a random direction; one scale a layer: ‖v_l‖."""
    layers = [layer for layer in domain.layers if layer.norm]

    def scaled(name: str, place: int, aside: float) -> None:
        measures = [(layer.layer + aside, getattr(layer, name), layer.norm) for layer in layers]
        shown = [
            (x, None if one.value is None else one.value / norm, one.interval and (one.interval[0] / norm, one.interval[1] / norm))
            for x, one, norm in measures
        ]
        draw_with_intervals(axes, shown, label=name.replace("_", "-").replace("separation", "in sample"), **series_style(place))

    scaled("separation", 0, -0.03)
    scaled("cross_validated", 1, 0.03)
    swapped = [(layer.layer, layer.swapped / layer.norm) for layer in layers if layer.swapped is not None]
    axes.plot([x for x, _ in swapped], [y for _, y in swapped], label="labels swapped", color=GREY, linestyle="--", marker="D", markersize=3)
    random = [(layer.layer, layer.random / layer.norm) for layer in layers]
    axes.plot([x for x, _ in random], [y for _, y in random], label="random direction", color=GREY, linestyle=":")
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]), top=max(1.08, axes.get_ylim()[1]))
    _layers(axes)
    axes.set_ylabel("separation / ‖v‖")


def draw_agreement(axes: Any, result: Activations, *, centred: bool) -> None:
    """|cos| of the first directions of every two domains, numbers in the cells."""
    names = [domain.name for domain in result.domains]
    values: dict[tuple[int, int], float | None] = {(place, place): 1.0 for place in range(len(names))}
    for pair in result.pairs:
        found = _of(pair, centred).first
        i, j = names.index(pair.first), names.index(pair.second)
        values[i, j] = values[j, i] = found
    draw_matrix(axes, [[values.get((i, j)) for j in range(len(names))] for i in range(len(names))], names, names, "|cos|")


def draw_directions(axes: Any, found: Agreement, first: str, second: str) -> None:
    """|cos| of each leading direction of one domain with each of the other."""
    rows = [f"{label(first, 14)} {number + 1}" for number in range(len(found.cosines))]
    columns = [str(number + 1) for number in range(len(found.cosines[0]) if found.cosines else 0)]
    draw_matrix(axes, found.cosines, rows, columns, "|cos|")
    axes.set_xlabel(f"direction of {label(second, 24)}")


def draw_overlaps(axes: Any, result: Activations, model: str, eta: float, *, centred: bool) -> None:
    """MSO of every two prompt sets by layer at one η, over random subspaces; in grey, halves of one set."""
    place = result.settings.etas.index(eta)
    chance: list[tuple[int, float]] = []
    halves: dict[int, list[float]] = {}
    for order, names in enumerate(result.set_pairs):
        found = [one for one in result.overlaps if one.model == model and (one.first, one.second) == names]
        points = [(one.layer, _curve(one, centred)[place]) for one in found]
        known = [(layer, point) for layer, point in points if point.mso is not None and point.expected is not None]
        name = f"{label(names[0], 18)} / {label(names[1], 18)}"
        axes.plot([layer for layer, _ in known], [point.mso for _, point in known], label=name, **series_style(order))
        chance += [(layer, point.expected) for layer, point in known if point.expected is not None]
        for layer, point in points:
            halves.setdefault(layer, []).extend(half for half in point.halves if half is not None)
    inner = [(layer, sum(values) / len(values)) for layer, values in sorted(halves.items()) if values]
    axes.plot([x for x, _ in inner], [y for _, y in inner], color=GREY, linestyle="--", label="two halves of one set (mean)")
    layers = sorted({layer for layer, _ in chance})
    ends = [[end([value for at, value in chance if at == layer]) for layer in layers] for end in (min, max)]
    axes.fill_between(layers, *ends, color=GREY, alpha=0.35, linewidth=1.5, label="random subspaces (range)")
    axes.set_ylim(-0.03, 1.03)
    _layers(axes)
    axes.set_ylabel(f"MSO at η = {eta:g}")


def draw_sweep(axes: Any, result: Activations, model: str, layer: int, *, centred: bool) -> None:
    """MSO against η at one layer, beside what random subspaces of as many directions give (dotted)."""
    for order, names in enumerate(result.set_pairs):
        one = next(one for one in result.overlaps if (one.model, one.layer, one.first, one.second) == (model, layer, *names))
        known = [point for point in _curve(one, centred) if point.mso is not None]
        style = series_style(order)
        etas = [point.eta for point in known]
        axes.plot(etas, [point.mso for point in known], label=f"{label(names[0], 18)} / {label(names[1], 18)}", **style)
        axes.plot(etas, [point.expected for point in known], color=style["color"], linestyle=":", linewidth=1.2)
    axes.set_ylim(-0.03, 1.03)
    axes.set(xlabel="η", ylabel=f"MSO at layer {layer}")


def activations_picture(result: Activations) -> Any:
    """The picture of `activations --plot`: positions, or separations, of every domain, then overlaps under aligned."""
    from matplotlib.figure import Figure

    draws: list[tuple[str, Any]] = []
    for domain in result.domains:
        draws.append(
            (domain.name, (lambda axes, domain=domain: draw_positions(axes, result, domain) if result.others else draw_separation(axes, domain)))
        )
    if result.overlaps:
        eta = middle_eta(result)
        draws.append(("prompt sets, aligned, centred", lambda axes: draw_overlaps(axes, result, ALIGNED, eta, centred=True)))
    figure = Figure(figsize=(4.4 * len(draws), 3.8))
    for axes, (title, draw) in zip(figure.subplots(1, len(draws), squeeze=False)[0], draws, strict=True):
        draw(axes)
        axes.set_title(label(title))
    legend_below(figure)
    return figure


def middle_eta(result: Activations) -> float:
    """The η that pictures by layer are drawn at: the one nearest to 0.9."""
    return min(result.settings.etas, key=lambda eta: abs(eta - 0.9))


def _of(pair: Any, centred: bool) -> Agreement:
    found: Agreement = pair.centred if centred else pair.uncentred
    return found


def _curve(overlap: SetOverlap, centred: bool) -> Any:
    return overlap.centred if centred else overlap.uncentred


def _layers(axes: Any) -> None:
    axes.set_xlabel("layer (0: embeddings)")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _style(name: str, place: int) -> dict[str, Any]:
    # The second series has aligned's colour.
    return model_style(name, place + 1 if place > 0 else 0)
