"""A brittleness probe as tables for people."""

from __future__ import annotations

from statistics import mean

from rich.table import Table

from lox_merge.cli.console import plain_console
from lox_merge.cli.show import figure, print_pairs, print_utility
from lox_merge.cli.show_asr import attack_cells
from lox_merge.safety.brittleness import LEADING, Brittleness, RemovalPoint, is_above


def print_brittleness(result: Brittleness) -> None:
    """Every curve, utility, and what to know about them; fits 80 columns."""
    base, aligned = (result.sources[role]["title"] for role in ("base", "aligned"))
    table = Table(title=f"ASR of aligned without k directions: {base} → {aligned}", title_justify="left", box=None, pad_edge=False)
    table.add_column("directions", no_wrap=True)
    for heading in ("k", "ASR", "95 %", "judged", "change", "p", "removed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("aligned", "0", *attack_cells(result.aligned), "", "", "")
    for point in result.curve():
        table.add_row(LEADING, str(point.rank), *attack_cells(point.attack), *_change(point), figure(point.mean_removed))
    plain_console().print(table)
    for control in result.controls:
        _print_control(result, control)
    print_utility("directions", _utility(result))
    print_pairs("", [("note", note) for note in result.notes])


def _print_control(result: Brittleness, control: str) -> None:
    table = Table(title=f"\n{control} directions of equal norm, {result.draws} draw(s)", title_justify="left", box=None, pad_edge=False)
    table.add_column("k", justify="right")
    for heading in ("mean ASR", "lowest", "highest", "above\naligned", "below\nleading"):
        table.add_column(heading, justify="right")
    for rank in result.ranks[1:]:
        points = [point for point in result.points if (point.directions, point.rank) == (control, rank)]
        rates = [point.attack.rate for point in points if point.attack.rate is not None]
        spread = [figure(of(rates) if rates else None) for of in (mean, min, max)]
        above = sum(is_above(point.against_aligned, result.level) for point in points)
        below = sum(point.against_leading is not None and is_above(point.against_leading, result.level) for point in points)
        table.add_row(str(rank), *spread, f"{above}/{len(points)}", f"{below}/{len(points)}")
    plain_console().print(table)


def _utility(result: Brittleness) -> list[tuple[str, dict[str, float | None]]]:
    """Leading point by point, of each control the mean over draws."""
    rows = [("aligned", result.aligned_utility), *((f"leading {point.rank}", point.utility) for point in result.curve())]
    for control in result.controls:
        for rank in result.ranks[1:]:
            drawn = [point.utility for point in result.points if (point.directions, point.rank) == (control, rank)]
            rows.append((f"{control} {rank}", {measure: _mean([found.get(measure) for found in drawn]) for measure in result.aligned_utility}))
    return rows


def _mean(values: list[float | None]) -> float | None:
    """None where one of them is undefined: a mean of the others would be of other draws."""
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None


def _change(point: RemovalPoint) -> tuple[str, str]:
    return figure(point.against_aligned.difference, "+.3f"), figure(point.against_aligned.p_value, ".2g")
