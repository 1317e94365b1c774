"""The figures of an inspection that people read first, as rows of plain text: for the terminal and for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

COLUMNS = ("measured", "random", "95 % of them")
_RANKS = {
    "energy_50": "50 % of energy",
    "energy_90": "90 % of energy",
    "energy_99": "99 % of energy",
    "stable": "stable",
    "participation": "participation",
}


class Row(NamedTuple):
    """One figure beside what a random subspace gives; '' where chance has nothing to say."""

    name: str
    measured: str
    random: str = ""
    band: str = ""


class Block(NamedTuple):
    """The rows of one change of weights."""

    title: str
    heading: str
    rows: list[Row]


def blocks(document: dict[str, Any]) -> list[Block]:
    """Alignment, then each fine-tuned model. document: as docs/inspect.md describes it."""
    sources, settings = document["sources"], document["settings"]
    heading = f"rank {settings['rank']}, {settings['side']} side"
    whole, linear = document["whole"], document["linear"]
    found = [Block(f"Alignment: {_name(sources['base'])} → {_name(sources['aligned'])}", heading, _alignment(whole["aligned"], linear["aligned"]))]
    for label, one, other in zip(document["labels"], whole["finetuned"], linear["finetuned"], strict=True):
        found.append(Block(f"Fine-tuning: {_name(sources['aligned'])} → {label}", heading, _fine_tuning(one, other)))
    return found


def as_html(document: dict[str, Any]) -> str:
    """The blocks and the notes for a notebook; takes its colours from the page."""
    parts = []
    for block in blocks(document):
        head = "".join(f"<th>{html.escape(text)}</th>" for text in (block.heading, *COLUMNS))
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in block.rows)
        parts.append(f"<table><caption>{html.escape(block.title)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")
    parts += [f"<p>{html.escape(note)}</p>" for note in document["notes"]]
    return "".join(parts)


def value_text(value: float | None, undecided: int = 0) -> str:
    """Three decimals, or two digits of a small value; in words where there is none."""
    if value is None:
        return "undecided" if undecided else "undefined"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"


def _name(source: dict[str, Any]) -> str:
    return f"{source['name']}@{source['revision']}" if source.get("revision") else str(source["name"])


def _alignment(whole: dict[str, Any], linear: dict[str, Any]) -> list[Row]:
    rows = [
        Row("‖Δ‖/‖W‖", _scientific(whole["relative_norm"])),
        _statistic("R_align, mean over linear layers", linear["r"]),
        _statistic("R_align, all energies", whole["r"], energy=True),
        *_kept(whole),
    ]
    rows += [Row(f"effective rank, {text}", _mean(linear["effective_ranks"][name])) for name, text in _RANKS.items()]
    return [*rows, Row("directions above rounding noise", _mean(linear["noise_floor_rank"]))]


def _fine_tuning(whole: dict[str, Any], linear: dict[str, Any]) -> list[Row]:
    cosines = whole["cosines"]
    expected = cosines["update_to_total_expected"]
    return [
        Row("‖Δ_ft‖/‖W‖", _scientific(whole["relative_norm"])),
        _statistic("R_ft, mean over linear layers", linear["r"]),
        _statistic("R_ft/R_align, mean over linear layers", linear["ratio"]),
        _statistic("R_ft/R_align, all energies", whole["ratio"], energy=True),
        *_kept(whole),
        Row("cos of Δ_ft and −Δ_align", value_text(cosines["safety_angle"]), "0", _range(cosines["band"], ".1e")),
        Row(
            "cos of Δ_ft and Δ_align + Δ_ft",
            value_text(cosines["update_to_total"]),
            "" if expected is None else value_text(expected),
            _range(cosines["update_to_total_band"], ".3f"),
        ),
        *(_overlap(entry) for entry in _some(linear["mso"])),
    ]


def _kept(group: dict[str, Any]) -> list[Row]:
    rows = []
    for entry in group["energy_kept"]:
        rows.append(_statistic(f"energy kept by {100 * entry['fraction']:g} % of directions", entry["top"], energy=True))
        if entry["random_k"]["matrices"]:
            drawn = _statistic("  by as many of Δ_align drawn at random", entry["random_k"], energy=True)
            rows.append(Row(drawn.name, drawn.measured))
    return rows


def _statistic(name: str, statistic: dict[str, Any], *, energy: bool = False) -> Row:
    value = statistic["energy" if energy else "mean"]
    expected = statistic["expected_energy" if energy else "expected"]
    random = "" if expected is None else value_text(expected)
    band = _range(statistic["band_energy" if energy else "band"], ".3f")
    return Row(name + _some_of(statistic), value_text(value, statistic["undecided"]), random, band)


def _overlap(entry: dict[str, Any]) -> Row:
    expected = "" if entry["expected"] is None else value_text(entry["expected"])
    return Row(f"overlap (MSO) at {100 * entry['eta']:g} % of energy" + _some_of(entry), value_text(entry["mean"], entry["undecided"]), expected)


def _some_of(entry: dict[str, Any]) -> str:
    """How many matrices decided a figure, where not all did."""
    return f" ({entry['matrices']} of {entry['matrices'] + entry['undecided']})" if entry["undecided"] and entry["matrices"] else ""


def _mean(entry: dict[str, Any]) -> str:
    return value_text(None, entry["undecided"]) if entry["mean"] is None else f"{entry['mean']:.1f}{_some_of(entry)}"


def _some(overlaps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries nearest to a tenth, half and nine tenths of the energy."""
    nearest = {min(range(len(overlaps)), key=lambda i: abs(overlaps[i]["eta"] - wanted)) for wanted in (0.1, 0.5, 0.9)} if overlaps else set()
    return [overlaps[i] for i in sorted(nearest)]


def _scientific(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2e}"


def _range(band: Sequence[float] | None, form: str) -> str:
    return "" if band is None else f"{format(band[0], form)} to {format(band[1], form)}"
