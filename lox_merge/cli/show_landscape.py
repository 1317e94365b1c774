"""A landscape as tables for people."""

from __future__ import annotations

from rich.table import Table

from lox_merge.cli.console import plain_console
from lox_merge.cli.show import figure, print_pairs
from lox_merge.safety.landscape.results import Landscape, PointResult, SliceResult

# Points along a line that a table shows; all are in the JSON and the picture.
_MOST_ROWS = 21


def print_landscape(result: Landscape) -> None:
    """Every slice, VISAGE, and what to know about it; fits 80 columns."""
    judge = next(iter(result.judges))
    lines = [found for found in result.slices if len(found.where.directions) == 1]
    for found in lines:
        _print_line(result, found, judge)
    for found in result.slices:
        if found not in lines:
            _print_plane(result, found, judge)
    rows = [
        (
            "model itself",
            f"ASR {_rate(result.anchor, judge)}" + "".join(f", {name} {figure(value, '.4g')}" for name, value in result.anchor.utility.items()),
        )
    ]
    for name in result.judges:
        rows += _visage_rows(result, name)
    print_pairs("\nVISAGE (mean of 100 − ASR % over points below 100 %)", rows)
    print_pairs("", [("note", note) for note in result.notes])


def _print_line(result: Landscape, found: SliceResult, judge: str) -> None:
    measures = list(result.anchor.utility)
    table = Table(title=f"\n{result.title}: {found.where.label} ({judge})", title_justify="left", box=None, pad_edge=False)
    for heading in ("a", "ASR", "95 %", "ended", *measures):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("")
    every = -(-len(found.points) // _MOST_ROWS)
    for number, ((at,), point) in enumerate(zip(found.where.places, found.points, strict=True)):
        if number % every:
            continue
        attack = point.attack_success.get(judge)
        interval = "undefined" if attack is None or attack.interval is None else f"{attack.interval[0]:.2f}–{attack.interval[1]:.2f}"
        cells = [f"{at:g}", figure(point.rate(judge)), interval, figure(point.finished, ".2f")]
        cells += [figure(point.utility.get(measure), ".4g") for measure in measures]
        table.add_row(*cells, "undefined" if point.undefined else _marked(found, at))
    plain_console().print(table)
    _print_marks(found)


def _print_plane(result: Landscape, found: SliceResult, judge: str) -> None:
    (first, second), points = found.where.axes, dict(zip(found.where.places, found.points, strict=True))
    table = Table(title=f"\n{result.title}: ASR (%) over {found.where.label} ({judge})", title_justify="left", box=None, pad_edge=False)
    table.add_column("b \\ a", justify="right")
    every = -(-len(first) // 11)
    shown = first[::every]
    for a in shown:
        table.add_column(f"{a:g}", justify="right", no_wrap=True)
    for b in reversed(second):
        rates = [points[a, b].rate(judge) for a in shown]
        table.add_row(f"{b:g}", *("·" if rate is None else f"{100 * rate:.0f}" for rate in rates))
    plain_console().print(table)
    _print_marks(found)


def _print_marks(found: SliceResult) -> None:
    if not found.marks:
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("model", *"ab"[: len(found.where.directions)], "off the span"):
        table.add_column(heading, justify="left" if heading == "model" else "right", overflow="fold")
    for mark in found.marks:
        table.add_row(mark.label, *(f"{value:.3f}" for value in mark.coordinates), figure(mark.off_plane))
    plain_console().print(table)


def _marked(found: SliceResult, at: float) -> str:
    names = (
        ["the model itself"] if at == 0 else [mark.label for mark in found.marks if abs(mark.coordinates[0] - at) < 1e-6 and not _off(mark.off_plane)]
    )
    return f"← {', '.join(names)}" if names else ""


def _off(share: float | None) -> bool:
    return share is not None and share > 1e-3


def _rate(point: PointResult, judge: str) -> str:
    return figure(point.rate(judge))


def _visage_rows(result: Landscape, judge: str) -> list[tuple[str, str]]:
    rows = []
    for found in result.slices:
        own = found.visage(judge)
        left = "".join(f", {count} {what}" for count, what in ((own.full, "at 100 %"), (own.undefined, "undefined")) if count)
        rows.append((found.where.label, f"{figure(own.value, '.1f')} ({judge}; {own.used} points{left})"))
    spread = result.spread(judge)
    if spread is not None and spread.directions > 1:
        interval = "undefined" if spread.interval is None else f"{spread.interval[0]:.1f} to {spread.interval[1]:.1f}"
        rows.append(
            (
                "random, mean",
                f"{figure(spread.mean, '.1f')} ({judge}; {figure(spread.low, '.1f')} to {figure(spread.high, '.1f')} over {spread.n} directions, "
                f"sd {figure(spread.sd, '.1f')}, 95 % {interval})",
            )
        )
    return rows
