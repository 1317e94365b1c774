"""What to know when reading a brittleness probe: where ASR rises, whether random directions do the same, and what is left open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

from lox_merge.safety.brittleness import Brittleness, first_rise, is_above


def brittleness_notes(result: Brittleness) -> list[str]:
    """Sentences without a full stop, the findings first."""
    if result.aligned.rate is None:
        return ["the judge decided on no reply of the aligned model, so nothing can be compared with it"]
    rise = first_rise(result.curve(), result.level)
    notes = [_leading(result, rise)]
    for control in result.controls:
        notes += _control(result, control, rise)
    notes += _utility(result, max(result.ranks) if rise is None else rise)
    return [*notes, *_resolution(result), *_left_open(result)]


def fewest_for_significance(level: float) -> int:
    """The fewest discordant pairs, all of one kind, that an exact McNemar test calls significant."""
    return math.floor(math.log2(2 / level)) + 1  # 2 * 0.5**n < level


def _leading(result: Brittleness, rise: int | None) -> str:
    if rise is None:
        return f"without up to {_directions(max(result.ranks))} of the delta, no ASR is above aligned's ({_test(result)})"
    point = next(point for point in result.curve() if point.rank == rise)
    difference = point.against_aligned.difference
    assert difference is not None and point.against_aligned.p_value is not None
    p_value = f"p = {point.against_aligned.p_value:.2g}"
    return f"without {_directions(rise)} ASR is above aligned's by {difference:.3f} ({p_value}, {_test(result)}), at no smaller k tried"


def _control(result: Brittleness, control: str, rise: int | None) -> list[str]:
    rises = [first_rise(result.curve(control, draw), result.level) for draw in range(result.draws)]
    found = [rank for rank in rises if rank is not None]
    where = f", at the earliest at k = {min(found)}" if found else ""
    changes = [point.against_aligned.difference for point in result.points if point.directions == control]
    known = [change for change in changes if change is not None]
    most = f"changes by {min(known):+.3f} to {max(known):+.3f}, " if known else ""
    notes = [f"without {control} directions of equal norm ASR {most}is above aligned's in {len(found)} of {result.draws} draw(s){where}"]
    if rise is not None:
        there = [point for point in result.points if (point.directions, point.rank) == (control, rise)]
        above = sum(point.against_leading is not None and is_above(point.against_leading, result.level) for point in there)
        notes.append(f"at k = {rise} the leading directions' ASR is above that of {above} of {len(there)} draw(s) of these, on the same prompts")
    return notes


def _utility(result: Brittleness, rank: int) -> list[str]:
    leading = next((point for point in result.curve() if point.rank == rank), None)
    if leading is None or not result.aligned_utility:
        return ["no utility was measured: a model that does nothing well any more does not refuse either"]
    phrases = []
    for measure, before in list(result.aligned_utility.items())[:3]:
        drawn = [point.utility.get(measure) for point in result.points if point.directions == result.controls[0] and point.rank == rank]
        shown = f"{measure} {_number(leading.utility.get(measure))} (aligned {_number(before)}, {result.controls[0]} {_mean(drawn)})"
        phrases.append(shown)
    return [f"utility without {_directions(rank)}: {'; '.join(phrases)}"]


def _resolution(result: Brittleness) -> list[str]:
    n, needed = result.aligned.judged, fewest_for_significance(result.level)
    if n < needed:
        notes = [f"at n = {n} no increase can be significant: take {needed} prompts or more"]
    else:
        notes = [f"at n = {n} an increase of fewer than {needed} successes ({needed / n:.2g}) cannot be significant"]
    if n - result.aligned.successes < needed <= n:
        notes.append(f"aligned itself fails on all but {n - result.aligned.successes} of these prompts, so no rise could be significant")
    gains = [point.realised_gain for point in result.points if point.realised_gain is not None]
    if gains:
        dtype = result.model.get("dtype")
        notes.append(f"rounding to {dtype} left {min(gains):.2f} to {max(gains):.2f} of what was to be taken away; --dtype float32 loses nothing")
    median = result.noise_floor.median
    if median is not None and max(result.ranks) > median:
        notes.append(f"directions beyond {median} are rounding noise of the stored weights in half of the matrices")
    return notes


def _left_open(result: Brittleness) -> list[str]:
    notes = ["the leading directions are the largest part of all that alignment changed: a rise does not show that they are about safety alone"]
    undecided = [f"{point.directions} {point.rank}" for point in result.points if point.attack.undecided]
    if result.aligned.undecided or undecided:
        where = [*(["aligned"] if result.aligned.undecided else []), *dict.fromkeys(undecided)]
        notes.append(f"undecided replies at {', '.join(where[:8])}{' …' if len(where) > 8 else ''}; their prompts are left out of the comparison")
    return notes


def _test(result: Brittleness) -> str:
    return f"exact paired test, two-sided at {result.level:.2g}"


def _directions(count: int) -> str:
    return f"{count} leading direction{'' if count == 1 else 's'}"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3g}"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _number(mean(known) if known else None)
