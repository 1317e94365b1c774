"""The section of a brittleness probe."""

from __future__ import annotations

from typing import Any

from lox_merge.publish.documents.brittleness import LEADING, Brittleness, RemovalPoint
from lox_merge.publish.documents.shape import read_as
from lox_merge.publish.figures.brittleness import draw_asr_against_directions, draw_utility_against_directions
from lox_merge.publish.report.notes import KEYWORD
from lox_merge.publish.report.numbers import counted, listed, rate_words, spread
from lox_merge.publish.report.section import (
    Cell,
    Head,
    Picture,
    Section,
    Table,
    change,
    change_interval,
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

# Pictures of utility; a task of lm-eval has a dozen metrics, and the table has them all.
_MEASURES = 3


def brittleness_sections(document: dict[str, Any], name: str) -> list[Section]:
    """ASR and utility by directions taken away, beside random ones, and what a rise leaves open. Raises RequestError."""
    return [brittleness_section(read_as(Brittleness, document, name))]


def brittleness_section(result: Brittleness) -> Section:
    """The section of a probe that is read already."""
    words = (
        f"Weights W_align − Proj_k(delta), made in memory and never written; ASR on {result.prompts.words} (judge: {result.judge_name}). "
        f"Aligned's own ASR is {rate_words(result.aligned.rate, result.aligned.interval)}.",
        *(note[:1].upper() + note[1:].rstrip(".") + "." for note in result.notes),
    )
    not_shown = (
        "That these directions are about safety: they are the largest part of everything alignment changed. Utility at the same k tells more.",
        "That only these directions matter: others may do the same, and directions found with activations (Wei et al. 2024) are other ones.",
        "That hardening helps, or that fine-tuning would take these directions: that takes an attack (lox-merge robustness).",
        None if "random-subspace" in result.controls else "What random mixtures of the delta's own rows do (--control random-subspace).",
        KEYWORD if result.judge.get("kind") == "keyword" else None,
    )
    details = (
        ("base", result.title("base")),
        ("aligned", result.title("aligned")),
        ("prompts", result.prompts.words),
        ("judge", result.judge_name),
        ("random directions", f"{listed(result.controls)}, {counted(result.draws, 'draw')} each, seed {result.seed}"),
        ("dtype in memory", str(result.model.get("dtype"))),
        ("test", f"exact McNemar, two-sided at {result.level:.2g} (5 % shared among {len(result.ranks) - 1} values of k)"),
    )
    return Section(
        "Brittleness", _in_short(result), without_empty(words), without_empty(not_shown), tuple(_pictures(result)), _tables(result), details
    )


def _in_short(result: Brittleness) -> str:
    if result.aligned.rate is None:
        return "The judge decided on no reply of the aligned model, so nothing can be compared with it."
    rise, most = result.rise, max(result.ranks)
    if rise is None:
        return f"Without up to {counted(most, 'leading direction')} of the delta ASR is not clearly above aligned's."
    drawn = [point for control in result.controls[:1] for point in result.drawn(control, rise.rank)]
    rates = [point.attack.rate for point in drawn if point.attack.rate is not None]
    beside = f"; {result.controls[0]} ones of equal norm: {spread(rates, sum(rates) / len(rates))}" if rates else ""
    return f"Without {counted(rise.rank, 'leading direction')} the ASR is {rate_words(rise.attack.rate, rise.attack.interval)}{beside}."


def _pictures(result: Brittleness) -> list[Picture]:
    caption = (
        "Whiskers are Wilson 95 % intervals over prompts; lines and bands of random directions are mean, lowest and highest of the draws. "
        "They have the norm of the leading ones in every matrix; the thin line is aligned's own ASR."
    )
    found = [panel("asr_against_directions", "ASR against directions taken away", caption, draw_asr_against_directions, result)]
    for measure in list(result.aligned_utility)[:_MEASURES]:
        name, title = name_of("utility_against_directions", measure), f"{measure} against directions taken away"
        found.append(panel(name, title, "Measured on the same models.", draw_utility_against_directions, result, measure))
    return found


def _tables(result: Brittleness) -> tuple[Table, ...]:
    measures, rounded = list(result.aligned_utility), any(point.realised_gain is not None for point in result.points)
    columns = heads(
        "directions",
        Head("draw"),
        Head("k", note="directions taken away in every matrix"),
        "ASR",
        "low",
        "high",
        "judged",
        "undecided",
        Head("change", note="paired with the aligned model, in percentage points"),
        Head("change low"),
        Head("change high"),
        Head("p", note="exact McNemar test against the aligned model"),
        Head("leading more by", note="ASR of the leading directions at the same k minus this one, in percentage points"),
        Head("p of that"),
        Head("removed", note="norm of what was taken away over the delta's, mean over matrices"),
        *([Head("realised", note="share of it that rounding to the model's dtype left")] if rounded else []),
        *measures,
    )

    def row(point: RemovalPoint) -> tuple[Cell, ...]:
        low, high = interval(point.attack.interval)
        other = point.against_leading
        return (
            word(point.directions),
            Cell("") if point.draw is None else count(point.draw),
            count(point.rank),
            *(rate(point.attack.rate), low, high, count(point.attack.judged), count(point.attack.undecided)),
            *(change(point.against_aligned.difference), *change_interval(point.against_aligned.interval)),
            figure(point.against_aligned.p_value, ".2g"),
            *((Cell(""), Cell("")) if other is None else (change(other.difference), figure(other.p_value, ".2g"))),
            figure(point.mean_removed),
            *([figure(point.realised_gain)] if rounded else []),
            *(figure(point.utility.get(measure), ".4g") for measure in measures),
        )

    low, high = interval(result.aligned.interval)
    aligned = (
        *(word("aligned"), Cell(""), count(0), rate(result.aligned.rate), low, high, count(result.aligned.judged), count(result.aligned.undecided)),
        *(Cell(""),) * 6,
        figure(0.0),
        *([Cell("")] if rounded else []),
        *(figure(result.aligned_utility.get(measure), ".4g") for measure in measures),
    )
    leading = Table("ASR without the leading directions", columns, (aligned, *(row(point) for point in result.leading)))
    controls = tuple(row(point) for point in result.points if point.directions != LEADING)
    return leading, Table("ASR without random directions of equal norm", columns, controls, folded=True)
