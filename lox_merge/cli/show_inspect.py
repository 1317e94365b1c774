"""An inspection as tables for people: every ratio beside what a random subspace gives."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console
from rich.table import Table

from lox_merge.cli.show import duration, figure
from lox_merge.diagnostics.weights import Inspection

_WIDTH = 80
_MOST_ROWS = 40
NOT_SHOWN = (
    "What lies in the leading directions of alignment is not thereby safety: in the models studied, useful and harmful updates share them alike. "
    "Compare with the random columns, and measure behaviour (lox-merge asr, robustness)."
)
_RANKS = {
    "energy_50": "50 % of energy",
    "energy_90": "90 % of energy",
    "energy_99": "99 % of energy",
    "stable": "stable",
    "participation": "participation",
}


def print_inspection(result: Inspection, by: str = "kind") -> None:
    """Alignment, each fine-tuned model, a table by kind of module or layer, and notes."""
    document = result.document
    sources, settings = document["sources"], document["settings"]
    console = Console()
    click.echo(f"{document['whole']['matrices']} matrices, {document['linear']['matrices']} of them linear layers; {duration(document['seconds'])}")
    console.print(_alignment(f"Alignment: {_name(sources['base'])} → {_name(sources['aligned'])}", result, settings))
    for place, label in enumerate(result.labels):
        console.print(_finetuned(f"Fine-tuning: {_name(sources['aligned'])} → {label}", result, place, settings))
    if by != "none":
        console.print(_groups(document["kinds" if by == "kind" else "layers"], result.labels, by))
    for text in [*result.notes, NOT_SHOWN]:
        click.echo(click.wrap_text(text, _WIDTH))


def _name(source: dict[str, Any]) -> str:
    return f"{source['name']}@{source['revision']}" if source.get("revision") else str(source["name"])


def _table(title: str, *columns: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=None, pad_edge=False, padding=(0, 1))
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _range(band: list[float] | None, form: str) -> str:
    return "" if band is None else f"{format(band[0], form)} to {format(band[1], form)}"


def _value(value: float | None, undecided: int = 0) -> str:
    if value is None:
        return "undecided" if undecided else "undefined"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"


def _statistic(table: Table, name: str, statistic: dict[str, Any], which: str = "mean") -> None:
    energy = which == "energy"
    expected, band = statistic["expected_energy" if energy else "expected"], statistic["band_energy" if energy else "band"]
    undecided = statistic["undecided"]
    some = f" ({statistic['matrices']} of {statistic['matrices'] + undecided})" if undecided and statistic["matrices"] else ""
    if expected is None:
        table.add_row(name + some, _value(statistic[which], undecided), "", "")
    else:
        table.add_row(name + some, _value(statistic[which], undecided), _value(expected), _range(band, ".3f"))


def _alignment(title: str, result: Inspection, settings: dict[str, Any]) -> Table:
    table = _table(title, f"rank {settings['rank']}, {settings['side']} side", "measured", "random", "95 % of them")
    whole, linear = result.whole["aligned"], result.linear["aligned"]
    table.add_row("‖Δ‖/‖W‖", f"{figure(whole['relative_norm'], '.2e')}", "", "")
    _statistic(table, "R_align, mean over linear layers", linear["r"])
    _statistic(table, "R_align, all energies", whole["r"], "energy")
    for entry in whole["energy_kept"]:
        _kept(table, entry)
    _ranks(table, linear)
    return table


def _kept(table: Table, entry: dict[str, Any]) -> None:
    share = f"{100 * entry['fraction']:g} %"
    _statistic(table, f"energy kept by {share} of directions", entry["top"], "energy")
    if entry["random_k"]["matrices"]:
        _statistic(table, "  by as many of Δ_align drawn at random", entry["random_k"] | {"expected_energy": None}, "energy")


def _ranks(table: Table, aligned: dict[str, Any]) -> None:
    for name, text in _RANKS.items():
        entry = aligned["effective_ranks"][name]
        table.add_row(f"effective rank, {text}", _mean(entry), "", "")
    table.add_row("directions above rounding noise", _mean(aligned["noise_floor_rank"]), "", "")


def _mean(entry: dict[str, Any]) -> str:
    if entry["mean"] is None:
        return "undecided" if entry["undecided"] else "undefined"
    some = f" ({entry['matrices']} of {entry['matrices'] + entry['undecided']})" if entry["undecided"] else ""
    return f"{entry['mean']:.1f}{some}"


def _finetuned(title: str, result: Inspection, place: int, settings: dict[str, Any]) -> Table:
    table = _table(title, f"rank {settings['rank']}, {settings['side']} side", "measured", "random", "95 % of them")
    whole, linear = result.whole["finetuned"][place], result.linear["finetuned"][place]
    table.add_row("‖Δ_ft‖/‖W‖", figure(whole["relative_norm"], ".2e"), "", "")
    _statistic(table, "R_ft, mean over linear layers", linear["r"])
    _statistic(table, "R_ft/R_align, mean over linear layers", linear["ratio"])
    _statistic(table, "R_ft/R_align, all energies", whole["ratio"], "energy")
    for entry in whole["energy_kept"]:
        _kept(table, entry)
    cosines = whole["cosines"]
    table.add_row("cos of Δ_ft and −Δ_align", _value(cosines["safety_angle"]), "0", _range(cosines["band"], ".1e"))
    expected = "" if cosines["update_to_total_expected"] is None else _value(cosines["update_to_total_expected"])
    table.add_row("cos of Δ_ft and Δ_align + Δ_ft", _value(cosines["update_to_total"]), expected, _range(cosines["update_to_total_band"], ".3f"))
    for entry in _some(linear["mso"]):
        some = f" ({entry['matrices']} of {entry['matrices'] + entry['undecided']})" if entry["undecided"] and entry["matrices"] else ""
        expected = "" if entry["expected"] is None else _value(entry["expected"])
        table.add_row(f"overlap (MSO) at {100 * entry['eta']:g} % of energy{some}", _value(entry["mean"], entry["undecided"]), expected, "")
    return table


def _some(overlaps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries nearest to a tenth, half and nine tenths of the energy."""
    nearest = {min(range(len(overlaps)), key=lambda i: abs(overlaps[i]["eta"] - wanted)) for wanted in (0.1, 0.5, 0.9)} if overlaps else set()
    return [overlaps[i] for i in sorted(nearest)]


def _groups(groups: list[dict[str, Any]], labels: list[str], by: str) -> Table:
    """R_align, and R_ft/R_align of the first models that fit the width."""
    shown = labels[:2]
    table = _table(
        f"By {by}: means over matrices, random in brackets", by, "matrices", "R_align", *(f"R_ft/R_align\n{_cut(label)}" for label in shown)
    )
    for group in groups[:_MOST_ROWS]:
        cells = [_pair(group["aligned"]["r"])] + [_pair(model["ratio"]) for model in group["finetuned"][: len(shown)]]
        table.add_row(group["name"], str(group["matrices"]), *cells)
    if len(groups) > _MOST_ROWS:
        table.caption = f"and {len(groups) - _MOST_ROWS} more: --json"
    return table


def _cut(label: str) -> str:
    return label if len(label) <= 16 else label[:15] + "…"


def _pair(statistic: dict[str, Any]) -> str:
    expected = "" if statistic["expected"] is None else f" ({statistic['expected']:.3f})"
    return _value(statistic["mean"], statistic["undecided"]) + expected
