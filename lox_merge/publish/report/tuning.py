"""The section of a study of rank and alpha."""

from __future__ import annotations

from typing import Any

from lox_merge.publish.documents.shape import read_as
from lox_merge.publish.documents.tuning import Trial, Tuning
from lox_merge.publish.figures.tuning import draw_front
from lox_merge.publish.report.notes import KEYWORD
from lox_merge.publish.report.numbers import counted, listed, number, rate_words
from lox_merge.publish.report.section import Cell, Section, Table, count, figure, heads, interval, panel, rate, without_empty, word, words_head


def tuning_sections(document: dict[str, Any], name: str) -> list[Section]:
    """The trials that no other beats in both aims, beside the aligned model. Raises RequestError."""
    study = read_as(Tuning, document, name)
    steps, best = study.training.steps[-1], study.best
    shown = listed([f"{trial.number} (rank and alpha {trial.recipe.words})" for trial in best], 4)
    summary = (
        f"Of {counted(len(study.trials), 'setting')} of rank and alpha for {study.aligned_title}, no other beats trial {shown} in both ASR after "
        f"{counted(steps, 'step')} of {study.attack.name} and divergence."
        if best
        else f"No setting of rank and alpha for {study.aligned_title} gave figures."
    )
    words = (
        f"ASR on {study.prompts.words} (judge: {study.judge_name}) after the same attack on every model; aligned: "
        f"{rate_words(study.aligned.rate, study.aligned.interval)}.",
        *(_at(trial) for trial in best[:4]),
        f"{counted(len(study.failed), 'trial')} gave no figures: {listed(list(study.failed))}." if study.failed else None,
    )
    not_shown = (
        "Which of these is best: the first is the safest after the attack, the last the closest to aligned.",
        "Anything beyond this one attack with one seed: differences within the intervals are noise. Check a choice by lox-merge robustness.",
        "A front chosen on these prompts looks better on them than it will on others.",
        KEYWORD if study.judge.get("kind") == "keyword" else None,
    )
    caption = "Numbers are trials. Left is closer to aligned, down is safer. Whiskers: Wilson 95 % intervals over prompts."
    picture = panel("front", "ASR after the attack against divergence", caption, draw_front, study)
    details = (
        ("attack", f"{study.attack.name}, {counted(study.attack.examples, 'example')} (sha256 {study.attack.sha256[:12]})"),
        ("prompts", study.prompts.words),
        ("harmless prompts", study.harmless.words),
        ("judge", study.judge_name),
    )
    return [Section("Rank and alpha", summary, without_empty(words), without_empty(not_shown), (picture,), (_table(study),), details)]


def _at(trial: Trial) -> str:
    rates = rate_words(trial.attack.rate, trial.attack.interval)
    return f"Trial {trial.number}, rank and alpha {trial.recipe.words}: ASR {rates}, KL from aligned {number(trial.divergence)} nats."


def _table(study: Tuning) -> Table:
    columns = heads("trial", words_head("rank, alpha"), "ASR", "low", "high", "judged", "KL", words_head("on the front"))
    ordered = sorted(study.trials, key=lambda trial: (not trial.on_front, trial.number))
    rows: list[tuple[Cell, ...]] = []
    for trial in ordered:
        rates = (rate(trial.attack.rate), *interval(trial.attack.interval), count(trial.attack.judged))
        rows.append((count(trial.number), word(trial.recipe.words), *rates, figure(trial.divergence), word("yes" if trial.on_front else "no")))
    aligned = study.aligned
    rows.append((word("aligned"), Cell(""), rate(aligned.rate), *interval(aligned.interval), count(aligned.judged), Cell("0", 0), Cell("")))
    return Table("Trials, those on the front first", columns, tuple(rows), folded=len(rows) > 40)
