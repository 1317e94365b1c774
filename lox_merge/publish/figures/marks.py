"""Marks that several pictures draw: rates with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lox_merge.publish.documents.shape import Interval

Measured = tuple[float, float | None, Interval | None]
"""Where on the axis, the value, and its interval; None where undefined, which is not drawn."""


def draw_with_intervals(axes: Any, measured: Sequence[Measured], *, across: bool = False, **style: Any) -> None:
    """A line through the defined values with whiskers for their intervals. across: values on the horizontal axis."""
    known = [(place, value, interval or (value, value)) for place, value, interval in measured if value is not None]
    places, values = [place for place, _, _ in known], [value for _, value, _ in known]
    # Intervals are computed and values counted: the last digit may differ.
    ends = [[max(0.0, value - low) for _, value, (low, _) in known], [max(0.0, high - value) for _, value, (_, high) in known]]
    if across:
        axes.errorbar(values, places, xerr=ends, capsize=3, elinewidth=1.2, **style)
    else:
        axes.errorbar(places, values, yerr=ends, capsize=3, elinewidth=1.2, **style)


def rate_axis(axes: Any, name: str = "attack success rate (ASR)") -> None:
    """The vertical axis of a rate, with room for a mark at either end."""
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel(name)
