"""The section of measured attack success."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lox_merge.publish.documents.attack_success import AttackSuccess, Evaluation
from lox_merge.publish.documents.shape import AttackRate, PairedChange, judge_words, read_as, source_title
from lox_merge.publish.figures.attack_success import draw_differences, draw_rates
from lox_merge.publish.report.notes import KEYWORD
from lox_merge.publish.report.numbers import change_words, listed, number, points, rate_words
from lox_merge.publish.report.section import (
    Cell,
    Head,
    Section,
    Table,
    change,
    change_interval,
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


def attack_success_sections(document: dict[str, Any], name: str) -> list[Section]:
    """Rates with intervals, differences on the same prompts, agreement of judges. Raises RequestError."""
    result = read_as(AttackSuccess, document, name)
    first = result.evaluations[0]
    judge = next(iter(first.attack_success))
    rates = [f"{one.title} {rate_words(found.rate, found.interval)}" for one in result.evaluations if (found := one.attack_success.get(judge))]
    summary = f"Attack success on {first.prompts.words} (judge: {judge}): {listed(rates)}."
    undecided = [one.title for one in result.evaluations if (found := one.attack_success.get(judge)) and found.undecided]
    words = (
        "ASR is successes over judged replies; what a judge could not decide counts as neither.",
        *(_compared(comparison) for comparison in result.comparisons if comparison.judge == judge),
        f"Other judges are in the tables: {listed(list(first.attack_success)[1:])}." if len(first.attack_success) > 1 else None,
        f"Some replies could not be decided: of {listed(undecided)}. Were all of them successes, the rates would be higher." if undecided else None,
    )
    differs = len({one.prompts.sha256 for one in result.evaluations}) > 1
    not_shown = (
        "What is left of this after fine-tuning: that takes an attack (lox-merge robustness).",
        "How other prompts, another judge or sampled replies would do: intervals are over these prompts only.",
        "The models were asked different prompts, so their rates do not compare." if differs else None,
        KEYWORD if any(identity.get("kind") == "keyword" for one in result.evaluations for identity in one.judges.values()) else None,
    )
    rows = len(result.evaluations)
    pictures = [
        panel(
            "asr",
            "Attack success rates",
            "Whiskers are Wilson 95 % intervals over prompts.",
            draw_rates,
            result,
            height=1.6 + 0.45 * rows + 0.2 * len(first.attack_success),
        )
    ]
    tables = [rates_table(result.evaluations, "Attack success rates")]
    if result.comparisons:
        size = 1.6 + 0.45 * (rows - 1) + 0.2 * len(first.attack_success)
        caption = "Whiskers are Tango 95 % intervals of the paired difference. An interval that holds 0 shows no clear difference."
        pictures.append(panel("asr_differences", "Paired differences", caption, draw_differences, result, height=size))
        tables.append(_differences(result))
    if any(one.by_category for one in result.evaluations):
        tables.append(_categories(result))
    if any(one.utility for one in result.evaluations):
        tables.append(_utility(result))
    if any(one.agreement for one in result.evaluations):
        tables.append(_agreement(result))
    return [Section("Attack success", summary, without_empty(words), without_empty(not_shown), tuple(pictures), tuple(tables), _details(first))]


def _compared(comparison: PairedChange) -> str:
    if comparison.difference is None or comparison.interval is None:
        return f"{comparison.second} against {comparison.first}: undefined, no reply of both was decided."
    low, high = comparison.interval
    clear = change_words(comparison, "fewer attacks succeed", "more attacks succeed")
    return (
        f"{comparison.second} against {comparison.first} on the same prompts: {points(comparison.difference)} percentage points "
        f"(95 % interval {points(low)} to {points(high)}, exact McNemar p = {number(comparison.p_value, '.2g')}): {clear}."
    )


def _details(evaluation: Evaluation) -> tuple[tuple[str, str], ...]:
    model = evaluation.model
    decoding, rendering = model.get("decoding"), model.get("rendering")
    found = [("prompts", evaluation.prompts.words), *((f"judge {name}", judge_words(name, who)) for name, who in evaluation.judges.items())]
    if isinstance(decoding, dict):
        found.append(("decoding", ", ".join(f"{key} {value}" for key, value in decoding.items())))
    if isinstance(rendering, dict):
        found.append(("chat template", "yes" if rendering.get("chat_template") else "no"))
    if isinstance(model.get("source"), dict):
        found.append(("first model", source_title(model["source"])))
    return tuple(found)


def rates_table(evaluations: Sequence[Evaluation], caption: str) -> Table:
    """Every model and judge."""
    columns = heads("model", words_head("judge"), *_RATE)
    rows = [
        (word(one.title), word(judge_words(judge, one.judges.get(judge, {}))), *_rate_cells(found))
        for one in evaluations
        for judge, found in one.attack_success.items()
    ]
    return Table(caption, columns, tuple(rows))


_RATE = ("ASR", "low", "high", "successes", "judged", "undecided", "prompts", "mean score")


def _rate_cells(found: AttackRate) -> tuple[Cell, ...]:
    counts = (count(found.successes), count(found.judged), count(found.undecided), count(found.n))
    score = figure(found.mean_score, ".2f") if found.mean_score is not None else Cell("–")
    return (rate(found.rate), *interval(found.interval), *counts, score)


def _categories(result: AttackSuccess) -> Table:
    columns = heads("model", words_head("judge"), words_head("category"), *_RATE)
    rows = [
        (word(one.title), word(judge), word(category), *_rate_cells(found))
        for one in result.evaluations
        for judge, categories in one.by_category.items()
        for category, found in categories.items()
    ]
    return Table("Attack success by category of prompt", columns, tuple(rows), folded=len(rows) > 30)


def _differences(result: AttackSuccess) -> Table:
    columns = heads(
        "model",
        words_head("against"),
        words_head("judge"),
        Head("change", note="percentage points"),
        "low",
        "high",
        Head("pairs", note="prompts decided for both"),
        Head("only first", note="successes against the first model alone"),
        Head("only this", note="successes against this model alone"),
        Head("p", note="two-sided exact McNemar test"),
    )
    rows = tuple(
        (
            word(one.second),
            word(one.first),
            word(one.judge),
            change(one.difference),
            *change_interval(one.interval),
            *map(count, (one.n, one.only_first, one.only_second)),
            figure(one.p_value, ".2g"),
        )
        for one in result.comparisons
    )
    return Table("Paired differences", columns, rows)


def _utility(result: AttackSuccess) -> Table:
    measures = list(dict.fromkeys(measure for one in result.evaluations for measure in one.utility))
    rows = tuple((word(one.title), *(figure(one.utility.get(measure), ".4g") for measure in measures)) for one in result.evaluations)
    return Table("Utility", heads("model", *measures), rows)


def _agreement(result: AttackSuccess) -> Table:
    columns = heads("model", words_head("judge"), words_head("and judge"), Head("kappa", note="agreement beyond chance, Cohen"), "replies")
    pairs = [(one.title, pair) for one in result.evaluations for pair in one.agreement]
    rows = tuple((word(title), word(pair.first), word(pair.second), figure(pair.kappa, ".2f"), count(pair.n)) for title, pair in pairs)
    return Table("Agreement of judges", columns, rows)
