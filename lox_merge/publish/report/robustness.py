"""The section of a comparison under fine-tuning attacks."""

from __future__ import annotations

from statistics import median
from typing import Any

from lox_merge.publish.documents.robustness import ALIGNED, HARDENED, Curve, Robustness
from lox_merge.publish.documents.shape import judge_words, read_as, source_title
from lox_merge.publish.figures.robustness import (
    draw_asr_against_steps,
    draw_degradation,
    draw_ratio_against_steps,
    draw_utility_against_steps,
    draw_with_and_without,
)
from lox_merge.publish.report.notes import robustness_notes
from lox_merge.publish.report.numbers import counted, listed, percent, points, rate_words
from lox_merge.publish.report.robustness_tables import medians_table, points_table
from lox_merge.publish.report.section import Picture, Section, Table, name_of, panel, without_empty


def robustness_sections(document: dict[str, Any], name: str) -> list[Section]:
    """ASR, R_ft/R_align and utility by step for every model, and what the comparison leaves open. Raises RequestError."""
    return [robustness_section(read_as(Robustness, document, name))]


def robustness_section(result: Robustness) -> Section:
    """The section of a comparison that is read already."""
    judge, attacks = next(iter(result.judges)), [attack.name for attack in result.attacks]
    summary = f"Under {counted(len(attacks), 'fine-tuning attack')} ({listed(attacks)}): {_in_short(result, judge)}"
    words = (
        f"The same data in the same order for every model; ASR judged by {judge} on {result.prompts.words}.",
        *(sentence for attack in attacks for sentence in _attack_words(result, attack, judge)),
        f"Other judges are in the tables: {listed(list(result.judges)[1:])}." if len(result.judges) > 1 else None,
    )
    tables: list[Table] = []
    for attack in attacks:
        for name in result.judges:
            tables.append(points_table(result, attack, name))
            if len(result.seeds) > 1:
                tables.append(medians_table(result, attack, name))
    notes = tuple(robustness_notes(result))
    return Section("Under attack", summary, without_empty(words), notes, tuple(_pictures(result)), tuple(tables), _details(result))


def _in_short(result: Robustness, judge: str) -> str:
    """The first attack's end for the first seeds, as a phrase."""
    step, attack = result.training.steps[-1], result.attacks[0].name
    rates = {model: _rates(result.of(attack, model), step, judge) for model in (ALIGNED, HARDENED)}
    if not all(rates.values()):
        return "some rates are undefined."
    shown = [f"{model} {percent(median(found))}" for model, found in rates.items()]
    over = f" (median over {len(result.seeds)} seeds)" if len(result.seeds) > 1 else ""
    return f"after {step} steps of {attack}, ASR is {listed(shown)}{over}."


def _attack_words(result: Robustness, attack: str, judge: str) -> list[str]:
    return [_sentence(result, attack, judge, step) for step in result.training.steps if step] + _control_words(result, attack, judge)


def _sentence(result: Robustness, attack: str, judge: str, step: int) -> str:
    """Aligned against LoX after one number of steps."""
    curves = {model: result.of(attack, model) for model in (ALIGNED, HARDENED)}
    rates = {model: _rates(found, step, judge) for model, found in curves.items()}
    beginning = f"{attack}, {counted(step, 'step')}: "
    if not all(rates.values()):
        return beginning + "ASR is undefined, because the judge decided on no reply."
    if len(result.seeds) > 1:
        shown = [f"{model} {percent(median(found))} ({percent(min(found))} to {percent(max(found))})" for model, found in rates.items()]
        worse = sum(one < other for one, other in zip(rates[HARDENED], rates[ALIGNED], strict=False))
        return f"{beginning}median ASR (lowest to highest seed) {listed(shown)}; LoX's is lower on {worse} of {len(rates[HARDENED])} seeds."
    points_ = {model: found[0].point(step) for model, found in curves.items()}
    shown = []
    for model, point in points_.items():
        if point is not None:
            shown.append(f"{model} {rate_words(point.attack_success[judge].rate, point.attack_success[judge].interval)}")
    hardened = points_[HARDENED]
    compared = hardened.against_aligned.get(judge) if hardened else None
    if compared is None or compared.difference is None or compared.interval is None:
        return f"{beginning}{listed(shown)}."
    low, high = compared.interval
    verdict = "no clear difference" if low <= 0 <= high else "LoX held longer" if high < 0 else "LoX did worse"
    return (
        f"{beginning}{listed(shown)}; paired difference {points(compared.difference)} percentage points "
        f"(95 % interval {points(low)} to {points(high)}): {verdict}."
    )


def _control_words(result: Robustness, attack: str, judge: str) -> list[str]:
    """How the controls did where LoX and aligned differ most, and which of them did as well as LoX."""
    medians: dict[int, dict[str, float]] = {}
    for step in result.training.steps:
        found = {model: _rates(result.of(attack, model), step, judge) for model in result.models}
        if step and all(found.values()):
            medians[step] = {model: median(rates) for model, rates in found.items()}
    if not result.controls or not medians or not {ALIGNED, HARDENED} <= set(result.models):
        return []
    step = max(medians, key=lambda at: medians[at][ALIGNED] - medians[at][HARDENED])
    rates = medians[step]
    shown = listed([f"{model} {percent(rates[model])}" for model in result.controls])
    as_good = [model for model in result.controls if rates[model] <= rates[HARDENED]]
    least = f"{listed(as_good)} did at least as well as LoX there" if as_good else "none of them did as well as LoX there"
    return [f"{attack}, controls of equal norm after {counted(step, 'step')}: {shown}, LoX {percent(rates[HARDENED])}; {least}."]


def _rates(curves: list[Curve], step: int, judge: str) -> list[float]:
    found = [point.attack_success[judge].rate for curve in curves if (point := curve.point(step))]
    return [rate for rate in found if rate is not None]


def _pictures(result: Robustness) -> list[Picture]:
    first, several = next(iter(result.judges)), len(result.seeds) > 1
    how = f"Lines: median over {len(result.seeds)} seeds; thin lines: each seed." if several else "Whiskers: Wilson 95 % intervals over prompts."
    found = []
    for attack in (attack.name for attack in result.attacks):
        for judge in result.judges:
            name = name_of("asr_against_steps", attack, "" if judge == first else judge)
            title = f"ASR against steps: {attack}" + ("" if judge == first else f", judged by {judge}")
            found.append(
                panel(name, title, f"{how} Marks are set beside each other where they would overlap.", draw_asr_against_steps, result, attack, judge)
            )
        caption = "How much of the weight change still lies in the leading alignment directions. 1: as before the attack."
        name, title = name_of("ratio_against_steps", attack), f"R_ft/R_align against steps: {attack}"
        found.append(panel(name, title, caption, draw_ratio_against_steps, result, attack))
        for measure in result.measures:
            name, title = name_of("utility_against_steps", attack, measure), f"{measure} against steps: {attack}"
            found.append(panel(name, title, "Measured on the same models.", draw_utility_against_steps, result, attack, measure))
    caption = "One mark a model, attack and seed. If dispersal and lost safety go together, marks fall from left to right. A correlation is no cause."
    found.append(panel("asr_change_against_ratio", "Change of ASR against R_ft/R_align", caption, draw_degradation, result, first))
    caption = "Arrows lead from aligned to LoX. R_ft is the share of the weight change that lies in the leading alignment directions."
    found.append(panel("asr_with_and_without", "ASR with and without LoX", caption, draw_with_and_without, result, first))
    return found


def _details(result: Robustness) -> tuple[tuple[str, str], ...]:
    training = result.training
    hardened = result.sources.get("hardened")
    made = source_title(hardened) if hardened else f"in memory, rank {result.recipe.rank}, alpha {result.recipe.alpha:g}"
    what = f"LoRA of rank {training.lora_rank}" if training.lora else "all weights"
    return (
        ("base", source_title(result.sources.get("base") or {})),
        ("aligned", source_title(result.sources.get("aligned") or {})),
        ("hardened", made),
        *(
            (f"attack {attack.name}", f"{counted(attack.examples, 'example')} of {attack.source} (sha256 {attack.sha256[:12]})")
            for attack in result.attacks
        ),
        ("training", f"{what}, learning rate {training.learning_rate:g}, batches of {training.batch_size}, AdamW"),
        ("prompts", result.prompts.words),
        ("judges", listed([judge_words(name, identity) for name, identity in result.judges.items()])),
        ("seeds", listed([str(seed) for seed in result.seeds])),
        ("intervals", result.interval),
    )
