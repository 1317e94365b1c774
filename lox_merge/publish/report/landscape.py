"""The section of a landscape."""

from __future__ import annotations

from functools import partial
from typing import Any

from lox_merge.publish.documents.landscape import Landscape, Measured, Slice
from lox_merge.publish.documents.shape import judge_words, read_as
from lox_merge.publish.figures.landscape import draw_lines, plane_figure, rates_of_utility
from lox_merge.publish.report.notes import KEYWORD
from lox_merge.publish.report.numbers import counted, number, rate_words
from lox_merge.publish.report.section import (
    Cell,
    Head,
    Picture,
    Section,
    Table,
    count,
    figure,
    heads,
    interval,
    name_of,
    panel,
    rate,
    without_empty,
    word,
)

_VISAGE = (
    "VISAGE depends on the range, the steps and the judge, and leaves out points where every attack succeeds: compare it between models "
    "measured alike only."
)
_BABBLE = (
    "That points of low ASR are safe: a model that babbles carries nothing out, and a judge may take its words for a reply of either kind. "
    "Utility and the share of replies that end tell."
)


def landscape_sections(document: dict[str, Any], name: str) -> list[Section]:
    """Lines, planes and VISAGE. Raises RequestError."""
    return [landscape_section(read_as(Landscape, document, name))]


def landscape_section(landscape: Landscape) -> Section:
    """The section of a landscape that is read already."""
    judge = next(iter(landscape.judges))
    words = [
        f"ASR at θ + a·d₁ (+ b·d₂) on {landscape.prompts.words}; every point's weights existed in memory only.",
        "Random directions are Gaussian and have in every tensor its norm; "
        f"they move {counted(landscape.moved['tensors'], 'tensor')} and leave {landscape.moved['stay']} (norms and biases) as they are."
        if any(found.random for found in landscape.slices)
        else None,
        *(_at_marks(found) for found in landscape.slices if found.marks),
        *(note[:1].upper() + note[1:].rstrip(".") + "." for note in landscape.notes),
    ]
    not_shown = (
        "That fine-tuning would move the weights in these directions: that takes an attack (lox-merge robustness).",
        _BABBLE if landscape.anchor.utility else _BABBLE + " No utility was measured here.",
        _VISAGE,
        "What lies between the measured points: colours between dots are drawn, not measured." if landscape.planes else None,
        KEYWORD if any(identity.get("kind") == "keyword" for identity in landscape.judges.values()) else None,
    )
    details = (
        ("prompts", landscape.prompts.words),
        ("judges", ", ".join(judge_words(name, identity) for name, identity in landscape.judges.items())),
        ("seed", str(landscape.seed)),
        ("time of a point", _cost(landscape)),
    )
    tables = (_visage_table(landscape), *(_points_table(landscape, found) for found in landscape.slices))
    return Section(
        "Landscape", _summary(landscape, judge), without_empty(words), without_empty(not_shown), tuple(_pictures(landscape)), tables, details
    )


def _summary(landscape: Landscape, judge: str) -> str:
    own = f"{landscape.title} has an ASR of {rate_words(landscape.anchor.rate(judge), _interval(landscape.anchor, judge))} ({judge})"
    spread = landscape.visage.get(judge)
    if spread is None:
        return f"{own}; {counted(sum(len(found.points) for found in landscape.slices), 'point')} around it and between models were measured."
    if spread.mean is None:
        return f"{own}; VISAGE is undefined along every random direction."
    over = f"{number(spread.low, '.1f')} to {number(spread.high, '.1f')} over {counted(spread.n, 'direction')}"
    return f"{own}; VISAGE along random directions is {number(spread.mean, '.1f')} of 100 ({over})."


def _interval(point: Measured, judge: str) -> Any:
    found = point.attack_success.get(judge)
    return None if found is None else found.interval


def _pictures(landscape: Landscape) -> list[Picture]:
    found = []
    for judge in landscape.judges:
        if landscape.lines:
            caption = (
                "0 is the model itself. Whiskers are Wilson 95 % intervals over prompts; the bold line is the mean over random directions, dashed "
                "lines are utility. Crosses are undefined points."
            )
            found.append(
                panel(name_of("asr_along_lines", judge), f"ASR along lines ({judge})", caption, draw_lines, landscape, judge, width=6.4, height=4.0)
            )
        for plane in landscape.planes:
            caption = (
                "Dots are measured points, the star is the model itself, other marks are models at least-squares coordinates; hatched: undefined."
            )
            build = partial(plane_figure, landscape, plane, judge)
            found.append(Picture(name_of("asr_over_plane", plane.label, judge), f"ASR over {plane.label} ({judge})", caption, build))
    for plane in landscape.planes:
        for measure in rates_of_utility(landscape):
            build = partial(plane_figure, landscape, plane, next(iter(landscape.judges)), measure)
            caption = "The same points: what a model near them is still good for."
            found.append(Picture(name_of("utility_over_plane", plane.label, measure), f"{measure} over {plane.label}", caption, build))
    return found


def _at_marks(found: Slice) -> str | None:
    shown = []
    for mark in found.marks:
        place = ", ".join(number(value, ".2f") for value in mark.coordinates)
        off = "" if mark.off_plane is None else f", {100 * mark.off_plane:.0f} % of its distance off it"
        shown.append(f"{mark.label} at ({place}{off})")
    return f"Models in the span of {found.label}: {'; '.join(shown)}."


def _cost(landscape: Landscape) -> str:
    own = [point for found in landscape.slices for point in found.points if any(point.at) and point.evaluation_seconds]
    if not own:
        return "not measured"
    change, whole = sum(point.change_seconds for point in own), sum(point.evaluation_seconds for point in own)
    return f"{whole / len(own):.2g} s of replies and verdicts, and {100 * change / whole:.1f} % of that to set the weights"


def _visage_table(landscape: Landscape) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for judge in landscape.judges:
        for found in landscape.slices:
            own = found.visage[judge]
            rows.append((word(found.label), word(judge), figure(own.value, ".1f"), count(own.used), count(own.full), count(own.undefined)))
    columns = heads(
        "slice",
        Head("judge", numeric=False),
        Head("VISAGE", note="mean of 100 − ASR (%) over the points used"),
        Head("used", note="points with an ASR below 100 %"),
        "at 100 %",
        "undefined",
    )
    return Table("VISAGE of every line and plane", columns, tuple(rows))


def _points_table(landscape: Landscape, found: Slice) -> Table:
    measures = list(landscape.anchor.utility)
    rows = []
    for point in found.points:
        for judge in landscape.judges:
            attack = point.attack_success.get(judge)
            low, high = interval(None if attack is None else attack.interval)
            rows.append(
                (
                    *(figure(value, ".3g") for value in point.at),
                    word(judge),
                    rate(point.rate(judge)),
                    low,
                    high,
                    count(None if attack is None else attack.judged),
                    count(None if attack is None else attack.undecided),
                    rate(point.finished),
                    *(figure(point.utility.get(measure), ".4g") for measure in measures),
                )
            )
    coordinates = [Head(name) for name in "ab"[: len(found.axes)]]
    columns = heads(
        *coordinates,
        Head("judge", numeric=False),
        "ASR",
        "low",
        "high",
        "judged",
        "undecided",
        Head("ended", note="replies the model ended"),
        *measures,
    )
    return Table(f"Points of {found.label}", columns, tuple(rows), folded=True)
