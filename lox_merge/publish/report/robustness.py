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
from lox_merge.publish.report.numbers import change_words, counted, listed, number, percent, points, rate_words, spread
from lox_merge.publish.report.robustness_tables import medians_table, points_table
from lox_merge.publish.report.section import Picture, Section, Table, name_of, panel, without_empty

# Pictures an attack; a task of lm-eval has a dozen metrics, and the table has them all.
_MEASURES = 3


def robustness_sections(document: dict[str, Any], name: str) -> list[Section]:
    """ASR, R_ft/R_align and utility by step for every model, and what the comparison leaves open. Raises RequestError."""
    return [robustness_section(read_as(Robustness, document, name))]


def robustness_section(result: Robustness) -> Section:
    """The section of a comparison that is read already."""
    judge, attacks = next(iter(result.judges)), [attack.name for attack in result.attacks]
    summary = _in_short(result, judge)
    words = (
        f"The same data in the same order for every model; ASR on {result.prompts.words} (judge: {judge}).",
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
    """Every attack's end, as a phrase."""
    step, phrases = result.training.steps[-1], []
    for attack in result.attacks:
        rates = {model: _rates(result.of(attack.name, model), step, judge) for model in (ALIGNED, HARDENED)}
        shown = [f"{model} {percent(median(found) if found else None)}" for model, found in rates.items()]
        phrases.append(f"of {attack.name}, {listed(shown)}")
    over = f" (medians over {len(result.seeds)} seeds)" if len(result.seeds) > 1 else ""
    return f"ASR after {counted(step, 'step')} {'; '.join(phrases)}{over}."


def _attack_words(result: Robustness, attack: str, judge: str) -> list[str]:
    """The step where LoX and aligned differ most, the last step, and the controls at the first of them."""
    gaps: dict[int, float] = {}
    for step in result.training.steps:
        one, other = (_rates(result.of(attack, model), step, judge) for model in (ALIGNED, HARDENED))
        if step and one and other:
            gaps[step] = median(one) - median(other)
    if not gaps:
        return [f"{attack}: ASR of aligned or LoX is undefined, because the judge decided on no reply."]
    widest, last = max(gaps, key=lambda step: abs(gaps[step])), max(gaps)
    at_end = _sentence(result, attack, judge, last, "the last step measured")
    if not gaps[widest]:
        return [at_end]
    first = [] if widest == last else [_sentence(result, attack, judge, widest, "the widest gap")]
    return [*first, at_end, *(_control_words(result, attack, judge, widest) if gaps[widest] > 0 else [])]


def _sentence(result: Robustness, attack: str, judge: str, step: int, why: str) -> str:
    """Aligned against LoX after one number of steps."""
    curves = {model: result.of(attack, model) for model in (ALIGNED, HARDENED)}
    beginning = f"{attack}, {counted(step, 'step')} ({why}): "
    if len(result.seeds) > 1:
        rates = {model: _rates(found, step, judge) for model, found in curves.items()}
        shown = [f"{model} {spread(found, median(found))}" for model, found in rates.items()]
        by_seed = [_by_seed(curves[model], step, judge) for model in (ALIGNED, HARDENED)]
        both = [seed for seed in by_seed[0] if seed in by_seed[1]]
        lower = sum(by_seed[1][seed] < by_seed[0][seed] for seed in both)
        where = f"{len(both)} seeds" if len(both) == len(result.seeds) else f"{counted(len(both), 'seed')} with a rate of both"
        return f"{beginning}median ASR (lowest to highest seed) {listed(shown)}; LoX's is lower on {lower} of {where}."
    points_ = {model: point for model, found in curves.items() if (point := found[0].point(step))}
    shown = [f"{model} {rate_words(point.attack_success[judge].rate, point.attack_success[judge].interval)}" for model, point in points_.items()]
    compared = points_[HARDENED].against_aligned.get(judge)
    if compared is None or compared.difference is None or compared.interval is None:
        return f"{beginning}ASR {listed(shown)}."
    low, high = compared.interval
    verdict = change_words(compared, "LoX held longer", "LoX did worse")
    return (
        f"{beginning}ASR {listed(shown)}; paired difference {points(compared.difference)} percentage points "
        f"(95 % interval {points(low)} to {points(high)}, exact McNemar p = {number(compared.p_value, '.2g')}): {verdict}."
    )


def _control_words(result: Robustness, attack: str, judge: str, step: int) -> list[str]:
    """Which controls were no clearly worse than LoX after this step: not above the end of its widest interval."""
    rates = {model: median(found) for model in result.controls if (found := _rates(result.of(attack, model), step, judge))}
    points_ = [point for curve in result.of(attack, HARDENED) if (point := curve.point(step))]
    ends = [interval[1] for point in points_ if (interval := point.attack_success[judge].interval)]
    if not rates or not ends:
        return []
    shown = listed([f"{model} {percent(rate)}" for model, rate in rates.items()])
    equal = [model for model, rate in rates.items() if rate <= max(ends)]
    if equal:
        verdict = f"{listed(equal)} did about as well as LoX (not above its 95 % interval), so the gap is not shown to come from LoX's directions"
    else:
        verdict = "all of them above LoX's 95 % interval"
    return [f"{attack}, {counted(step, 'step')}, controls of equal norm: {shown}; {verdict}."]


def _rates(curves: list[Curve], step: int, judge: str) -> list[float]:
    return list(_by_seed(curves, step, judge).values())


def _by_seed(curves: list[Curve], step: int, judge: str) -> dict[int, float]:
    """Seeds whose rate is defined."""
    found = {curve.seed: point.attack_success[judge].rate for curve in curves if (point := curve.point(step))}
    return {seed: rate for seed, rate in found.items() if rate is not None}


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
        for measure in result.measures[:_MEASURES]:
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
    made = source_title(hardened) if hardened is not None else f"in memory, rank {result.recipe.rank}, alpha {result.recipe.alpha:g}"
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
