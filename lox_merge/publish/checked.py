"""Values of result files that others may have written: each is what a card can show, or a ValueError that says what it is instead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Ends of intervals are computed: an end at 0 or 1 may lie this far beyond.
_SLACK = 1e-9


def text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_shown(value)}, not a text")
    return value


def count(value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {_shown(value)}, not a count")
    return value


def number(value: Any, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number from `low` to `high`."""
    try:
        found = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        found = math.inf
    if not (math.isfinite(found) and low <= found <= high):
        raise ValueError(f"{name} is {_shown(value)}, not a number{'' if math.isinf(high) else f' from {low:g} to {high:g}'}")
    return found


def optional(value: Any, name: str, low: float = -math.inf, high: float = math.inf) -> float | None:
    """The same, or None where it is undefined."""
    return None if value is None else number(value, name, low, high)


def interval(value: Any, low: float, high: float) -> tuple[float, float] | None:
    """Both ends, in order; None where there is no interval."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"an interval is {_shown(value)}, not two numbers")
    first, last = (number(end, "an interval's end", low - _SLACK, high + _SLACK) for end in value)
    if first > last:
        raise ValueError(f"an interval goes from {first:g} down to {last:g}")
    return first, last


def prompts(value: Any) -> Mapping[str, Any]:
    """The prompts that were asked, by source, number and hash."""
    if not isinstance(value, dict):
        raise ValueError(f"prompts are {_shown(value)}, not an object")
    text(value["source"], "prompts.source")
    text(value["sha256"], "prompts.sha256")
    count(value["n"], "prompts.n")
    return value


def _shown(value: Any) -> str:
    shown = ascii(value) if isinstance(value, (str, float, bool, type(None))) else f"of type {type(value).__name__}"
    return shown if len(shown) <= 40 else shown[:39] + "…"
