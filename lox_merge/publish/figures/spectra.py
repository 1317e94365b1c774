"""Singular values of deltas by index: where the strong directions end and rounding noise begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from lox_merge.publish.figures.style import GREY, label, series_style

Spectrum = Sequence[tuple[int, float]]
"""Index from 1 and singular value."""


def draw_spectra(axes: Any, kinds: Mapping[str, Sequence[Spectrum]], edges: Sequence[float] = (), unit: str = "singular value of delta") -> None:
    """The median over each kind's matrices, with the range from smallest to largest shaded.

    edges: singular values that rounding alone would give; their range is shaded grey.
    """
    for position, (kind, spectra) in enumerate(kinds.items()):
        by_index: dict[int, list[float]] = {}
        for spectrum in spectra:
            for index, value in spectrum:
                if value > 0:  # the axis is logarithmic
                    by_index.setdefault(index, []).append(value)
        indices, style = sorted(by_index), series_style(position)
        if not indices:
            continue
        step = max(1, len(indices) // 12)
        axes.plot(indices, [median(by_index[index]) for index in indices], label=label(kind, 24), markevery=step, **style)
        if len(spectra) > 1:
            low, high = ([end(by_index[index]) for index in indices] for end in (min, max))
            axes.fill_between(indices, low, high, color=style["color"], alpha=0.12, linewidth=0)
    noise = [edge for edge in edges if edge > 0]
    if noise:
        axes.axhspan(min(noise), max(noise), color=GREY, alpha=0.25, linewidth=0)
        axes.axhline(median(noise), color=GREY, linestyle="--", linewidth=1.2, label="rounding noise")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("index of the singular value")
    axes.set_ylabel(unit)
    if all(index == int(index) for index in axes.get_xticks()) or axes.get_xlim()[1] < 20:
        axes.xaxis.get_major_locator().set_params(integer=True)
