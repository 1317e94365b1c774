"""Factors and rank searches as tables for people."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from lox_merge.cli.console import plain_console
from lox_merge.cli.show import duration, figure, print_utility, size
from lox_merge.cli.show_asr import attack_cells
from lox_merge.jobs.decompose import DecomposeResult
from lox_merge.safety.search import RankSearch
from lox_merge.wording import first_few

_MOST_NAMED = 8


def _pairs(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title or None, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    plain_console().print(table)


def print_selection(base: str, aligned: str, report: dict[str, Any]) -> None:
    """The dry run's table of `decompose`."""
    rows = [("base", base), ("aligned", aligned)]
    rows.append(("decomposed", f"{report['tensors']} tensors, {report['matrices']} matrices, rank {report['recipe']['rank']}"))
    rows += [("left out", f"{count} tensors: {reason}") for reason, count in report["left_out"].items()]
    rows += [("read", size(report["bytes_read"])), ("write", f"at most {size(report['bytes_written'])}")]
    for text in report["warnings"]:
        click.echo(f"warning: {text}", err=True)
    _pairs("Plan (nothing was written)", rows)


def print_decomposition(result: DecomposeResult) -> None:
    """The result's table of `decompose`."""
    records = list(result.factors.matrices.values())
    bounds = [(record.certificate["angle_bound"], record.name + record.part) for record in records if record.certificate["angle_bound"] is not None]
    worst = max(bounds, default=None)
    ambiguous = sum(record.certificate["ambiguous"] for record in records)
    zero = sum(record.norm == 0 for record in records)
    rows = [
        ("matrices", f"{len(records)}, up to {result.factors.rank} triplets each" + (f"; {zero} with a zero delta" if zero else "")),
        ("worst certificate", f"sin angle ≤ {worst[0]:.1e} ({worst[1]})" if worst else "no SVD was needed"),
        ("ambiguous at full rank", f"{ambiguous} of {len(records)}"),
        ("size", size(result.path.stat().st_size)),
        ("time", duration(result.seconds) if result.computed else "nothing to do: the file was complete, its sources were compared"),
    ]
    skipped = result.factors.document["non_finite"]
    if skipped:
        rows.append(("left out (NaN or Inf)", f"{len(skipped)} matrices: {first_few(skipped, _MOST_NAMED)}"))
    _pairs(f"Factors in {result.path}", rows)


def print_search(result: RankSearch, *, base: str, aligned: str) -> None:
    """The curve, the effective rank, and what to know about it; fits 80 columns."""
    table = Table(title=f"ASR of base + Proj_r(delta): {base} → {aligned}", title_justify="left", box=None, pad_edge=False)
    table.add_column("rank", no_wrap=True)
    for heading in ("ASR", "95 %", "judged", "increase", "≤ (95 %)", "R_align"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for point in result.curve:
        verdict = "" if not point.accepted else "← effective" if point.rank == result.effective_rank else "ok"
        cells = [str(point.rank), *attack_cells(point.attack), figure(point.increase, "+.3f"), figure(point.upper_bound), figure(point.mean_r_align)]
        table.add_row(*cells, verdict)
    table.add_row("aligned", *attack_cells(result.aligned), "", "", "", "")
    plain_console().print(table)
    print_utility("rank", [*((str(point.rank), point.utility) for point in result.curve), ("aligned", result.aligned_utility)])
    criterion = f"{'upper 95 % bound of the increase' if result.confident else 'increase'} < {result.rho:g}"
    found = "none" if result.effective_rank is None else str(result.effective_rank)
    rows = [("effective rank", f"{found} ({criterion})"), ("noise-floor rank", _noise(result))]
    _pairs("", rows + [("note", note) for note in result.notes])


def _noise(result: RankSearch) -> str:
    floor = result.noise_floor
    if floor.smallest is None:
        return "undefined (every delta is zero)"
    if floor.median is None:
        return f"above the triplets held (smallest {floor.smallest}; {floor.open} matrices have no direction below the noise)"
    largest = "more than is held" if floor.largest is None else str(floor.largest)
    return f"median {floor.median} over the matrices, smallest {floor.smallest}, largest {largest}"
