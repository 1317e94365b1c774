"""The section of a rank search."""

from __future__ import annotations

from typing import Any

from lox_merge.publish.documents.search import RankPoint, Search
from lox_merge.publish.documents.shape import read_as
from lox_merge.publish.figures.search import draw_rank_curve
from lox_merge.publish.report.notes import KEYWORD
from lox_merge.publish.report.numbers import number, rate_words
from lox_merge.publish.report.section import (
    Cell,
    Head,
    Section,
    Table,
    change,
    count,
    figure,
    heads,
    interval,
    panel,
    rate,
    without_empty,
    word,
    words_head,
)


def search_sections(document: dict[str, Any], name: str) -> list[Section]:
    """ASR against rank with the threshold, and what the effective rank leaves open. Raises RequestError."""
    return [search_section(read_as(Search, document, name))]


def search_section(search: Search) -> Section:
    """The section of a search that is read already."""
    found = next((point for point in search.curve if point.rank == search.effective_rank), None)
    criterion = (
        f"{'the upper 95 % bound of its increase' if search.confident else 'its increase'} over the aligned model's ASR is below {search.rho:g}"
    )
    if found is None:
        summary = f"No tried rank is as safe as {search.aligned_title}: there is none where {criterion}."
    else:
        summary = f"The effective rank of {search.aligned_title} is {found.rank}: the smallest tried rank where {criterion}."
    aligned = search.aligned
    words = (
        f"ASR of base + Proj_r(delta) at every tried rank r, on {search.prompts.words} (judge: {search.judge_name}). "
        f"The aligned model's own ASR is {rate_words(aligned.rate, aligned.interval)}.",
        _at(found),
        *(note[:1].upper() + note[1:].rstrip(".") + "." for note in search.notes),
    )
    not_shown = (
        "That hardening with this rank helps: that takes a fine-tuning attack (lox-merge robustness).",
        "That these directions are about safety alone: utility at the same ranks, and edits of equal norm, tell.",
        KEYWORD if search.judge.get("kind") == "keyword" else None,
    )
    picture = panel(
        "asr_against_rank",
        "ASR against rank",
        "Whiskers are Wilson 95 % intervals over prompts. A rank passes when its ASR lies below the dashed threshold. "
        "R_align is the share of the delta's norm that a rank keeps.",
        draw_rank_curve,
        search,
    )
    floor = search.noise_floor
    details = (
        ("prompts", search.prompts.words),
        ("judge", search.judge_name),
        (
            "rank above rounding noise",
            f"median {_rank(floor.median)}, smallest {_rank(floor.smallest)}, largest {_rank(floor.largest)} over the matrices",
        ),
    )
    return Section("Effective rank", summary, without_empty(words), without_empty(not_shown), (picture,), (_table(search),), details)


def _at(point: RankPoint | None) -> str | None:
    if point is None:
        return None
    return f"At rank {point.rank} the ASR is {rate_words(point.attack.rate, point.attack.interval)} and mean R_align {number(point.mean_r_align)}."


def _rank(value: int | None) -> str:
    return "more than is held" if value is None else str(value)


def _table(search: Search) -> Table:
    measures = list(search.aligned_utility)
    columns = heads(
        "rank",
        "ASR",
        "low",
        "high",
        "judged",
        "undecided",
        Head("increase", note="paired with the aligned model, in percentage points"),
        Head("bound", note="one-sided upper 95 % bound of the increase, in percentage points"),
        Head("mean R_align", note="share of the delta's norm that the rank keeps, mean over matrices"),
        Head("energy R_align", note="the same of all matrices together"),
        *measures,
        words_head("passes"),
    )

    def row(label: Cell, point: Any, attack: Any, utility: dict[str, float | None], passes: str) -> tuple[Cell, ...]:
        low, high = interval(attack.interval)
        own = (
            (change(point.increase), change(point.upper_bound), figure(point.mean_r_align), figure(point.energy_r_align))
            if point
            else (Cell(""),) * 4
        )
        rates = (rate(attack.rate), low, high, count(attack.judged), count(attack.undecided))
        return (label, *rates, *own, *(figure(utility.get(measure), ".4g") for measure in measures), Cell(passes, passes or None))

    rows = [row(count(point.rank), point, point.attack, point.utility, "yes" if point.accepted else "no") for point in search.curve]
    rows.append(row(word("aligned"), None, search.aligned, search.aligned_utility, ""))
    return Table("ASR of base + Proj_r(delta)", columns, tuple(rows))
