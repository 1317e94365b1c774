"""The section of compared expectations: how deep alignment is, and where other models lie between aligned and base."""

from __future__ import annotations

from typing import Any

from lox_merge.publish.documents.behaviour import ALIGNED, BASE, Behaviour, NextTokens, TextSet
from lox_merge.publish.documents.shape import read_as, source_title
from lox_merge.publish.figures.behaviour import draw_divergence, draw_likelihoods, draw_moved, draw_next_tokens, draw_reversion
from lox_merge.publish.report.behaviour_tables import distances_table, likelihoods_table, positions_table, reversions_table, shares_table
from lox_merge.publish.report.behaviour_words import NOT_SHOWN
from lox_merge.publish.report.numbers import counted, listed, number, percent, percent_interval
from lox_merge.publish.report.section import Picture, Section, Table, name_of, panel, without_empty

# Bars of so many prefixes; the tables have them all.
_MOST_PREFIXES = 6
# What is shown as 0.00.
_AS_GOOD_AS = 0.005
# A mixture of two distributions has a detour up to 1.12, one that shares nothing with either has 2.
_ELSEWHERE = 1.5


def behaviour_sections(document: dict[str, Any], name: str) -> list[Section]:
    """KL by token, log-probabilities, reversion, next tokens. Raises RequestError."""
    result = read_as(Behaviour, document, name)
    words = (
        *(sentence for found in result.sets for sentence in _set_words(result, found)),
        *(_next_words(result, found) for found in result.next_tokens),
        *result.notes,
    )
    lone = "Only one set was read, so no harmless texts stand beside it as a control." if len(result.sets) == 1 else None
    return [
        Section(
            "What the models expect",
            _in_short(result),
            without_empty(words),
            without_empty((lone, *NOT_SHOWN)),
            tuple(_pictures(result)),
            tuple(_tables(result)),
            _details(result),
        )
    ]


def _in_short(result: Behaviour) -> str:
    if not result.sets:
        return f"What {listed(result.models)} would say next after {counted(len(result.next_tokens), 'beginning')}."
    found = result.sets[0]
    first = found.kl_from_base[ALIGNED].shares[0]
    budget = f"{percent(first.share)} of aligned's KL from base on {found.name} lies in the first token ({percent(first.even)} if it were even)"
    between = [f"{name} {number(found.reversion[name].index, '.2f')}" for name in result.others]
    return f"{budget}{f'; reversion index (0 aligned, 1 base): {listed(between)}' if between else ''}."


def _set_words(result: Behaviour, found: TextSet) -> list[str]:
    shift = found.kl_from_base[ALIGNED]
    one = shift.shares[0]
    if shift.largest is None:
        return [f"{found.name}: aligned and base expect the same."]
    where = "the first token" if shift.largest == 1 else f"token {shift.largest}, not the first"
    ends = f" (95 % interval {percent_interval(one.interval)})" if one.interval else ""
    per_text = f"; text by text {percent(one.per_text)} on average ({percent(one.per_text_even)} if even)"
    lines = [
        f"{found.name} ({counted(found.examples, 'text')}): KL of aligned from base is largest at {where}; the first one has {percent(one.share)} of "
        f"the budget of {number(shift.budget, '.3g')} nats{ends}{per_text}."
    ]
    for name in result.others:
        reversion = found.reversion[name]
        moved = f"log p {number(0.0 - reversion.moved, '+.3g')} nats a text against aligned's (base's {number(0.0 - reversion.gap, '+.3g')})"
        if reversion.index is None:
            lines.append(f"{found.name}, {name}: {moved}; too little between aligned and base for a reversion index.")
            continue
        ends = f" (95 % interval {number(reversion.interval[0], '.2f')} to {number(reversion.interval[1], '.2f')})" if reversion.interval else ""
        lines.append(f"{found.name}, {name}: reversion {number(reversion.index, '.2f')}{ends}, {_place(reversion.index)}; {moved}.")
    return lines


def _place(index: float) -> str:
    for name, there in ((ALIGNED, 0), (BASE, 1)):
        if abs(index - there) < _AS_GOOD_AS:
            return f"as {name}"
    return "between aligned and base" if 0 < index < 1 else "beyond aligned" if index < 0 else "beyond base"


def _next_words(result: Behaviour, found: NextTokens) -> str | None:
    if not result.others:
        return None
    if any(between.index is None for between in found.between.values()):
        return f"After “{found.prefix.words}”, aligned and base hardly differ, so nothing lies between them."
    shown = []
    for name in result.others:
        between = found.between[name]
        away = between.detour is not None and between.detour > _ELSEWHERE
        shown.append(f"{name} {number(between.index, '.2f')}{' (but it went elsewhere: far from both)' if away else ''}")
    return f"After “{found.prefix.words}”, share of the way from aligned (0) to base (1) by Jensen–Shannon distance: {listed(shown)}."


def _pictures(result: Behaviour) -> list[Picture]:
    found: list[Picture] = []
    whiskers = "Whiskers: 95 % bootstrap intervals over texts."
    for one in result.sets:
        caption = f"Mean over the texts that are that long. {whiskers} Above 0 everywhere; alignment a few tokens deep is high at the left only."
        found.append(panel(name_of("kl_by_token", one.name), f"KL from base by token: {one.name}", caption, draw_divergence, result, one))
        caption = "One mark a text and model; on the dashed line the model finds the text as probable as aligned does."
        found.append(panel(name_of("log_probability", one.name), f"Log-probability of each text: {one.name}", caption, draw_likelihoods, result, one))
    if result.sets and result.others:
        height = 1.6 + 0.3 * len(result.sets) * max(1, len(result.others) / 2)
        caption = f"{whiskers} A set without a mark has no index: aligned and base hardly differ on it. Wide whiskers may leave the picture."
        found.append(panel("reversion", "Between aligned and base", caption, draw_reversion, result, height=height))
        caption = f"{whiskers} The upright dash is base. A model that moved as far on harmless texts changed its style, whatever its index says."
        found.append(panel("moved", "Movement away from aligned", caption, draw_moved, result, height=height))
    for place, after in enumerate(result.next_tokens[:_MOST_PREFIXES], 1):
        size = 1.2 + 0.13 * (len(result.models) + 1) * min(12, len(after.candidates))
        caption = f"After “{after.prefix.words}”: the most probable tokens of any model."
        found.append(
            panel(name_of("next_token", str(place)), f"Next token, beginning {place}", caption, draw_next_tokens, result, after, height=size)
        )
    return found


def _tables(result: Behaviour) -> list[Table]:
    tables = []
    if result.sets:
        tables += [shares_table(result), likelihoods_table(result)]
        if result.others:
            tables.append(reversions_table(result))
        tables.append(positions_table(result))
    if result.next_tokens:
        tables.append(distances_table(result))
    return tables


def _details(result: Behaviour) -> tuple[tuple[str, str], ...]:
    settings = result.settings
    return (
        *((name, source_title(result.sources.get(name) or {})) for name in (BASE, ALIGNED)),
        *(
            (f"texts {found.name}", f"{found.examples} of {found.source}, {found.tokens} tokens (sha256 {found.sha256[:12]})")
            for found in result.sets
        ),
        ("vocabulary", f"{settings.get('vocabulary')} tokens"),
        ("precision", listed([f"{name} {dtype}" for name, dtype in (settings.get("dtypes") or {}).items()])),
        ("intervals", str(settings.get("interval"))),
        ("reversion index", str(settings.get("reversion_rule"))),
    )
