"""The sections of a demo: what the toy is, and the sections of the runs inside it."""

from __future__ import annotations

from typing import Any

from lox_merge.publish.documents.demo import Demo, FullDemo
from lox_merge.publish.documents.shape import read_as
from lox_merge.publish.figures.demo import draw_over_seeds
from lox_merge.publish.report.attack_success import rates_table
from lox_merge.publish.report.numbers import UNDEFINED, counted, listed
from lox_merge.publish.report.robustness import robustness_section
from lox_merge.publish.report.search import search_section
from lox_merge.publish.report.section import Cell, Head, Section, Table, figure, heads, name_of, panel, without_empty, word, words_head

_TOY = (
    "Anything about real models: these are tiny, speak a language of symbols, and their base model was taught how to refuse, without which "
    "extrapolation breaks refusals instead of strengthening them.",
    "That the leading directions are special: extrapolating the whole delta to the same norm (full-rank) does as well on average in the toy.",
)


def demo_sections(document: dict[str, Any], name: str) -> list[Section]:
    """What was trained, the rank search, and a section an attack. Raises RequestError."""
    result = read_as(Demo, document, name)
    summary = f"A toy pair of {result.parameters:,} parameters (seed {result.seed}) was trained, hardened, and attacked by fine-tuning in memory."
    words = (
        "A request is symbols, such as v3 a7 n12; forbidden ones are to be refused. The hardened model was taken from its folder, as a user would.",
        f"Before alignment the base model does not refuse; its figures are below, asked as aligned is (seed {result.seed}).",
    )
    not_shown = (
        *_TOY,
        "Anything about other seeds: one seed is one draw, and the intervals count requests, not seeds.",
        "The settings were tuned while looking at this seed, among others; expect less elsewhere." if result.seed_was_used_for_tuning else None,
    )
    first = Section("Demo", summary, words, without_empty(not_shown), tables=(rates_table([result.base], "The base model"),))
    return [first, search_section(result.search), *map(robustness_section, result.attacks)]


def full_demo_sections(document: dict[str, Any], name: str) -> list[Section]:
    """Medians and ranges over seeds. Raises RequestError."""
    result = read_as(FullDemo, document, name)
    ranks = listed([UNDEFINED if rank is None else str(rank) for rank in result.effective_ranks], 20)
    summary = f"Toy pairs of {counted(len(result.seeds), 'seed')} were trained, hardened and attacked; their effective ranks are {ranks}."
    tuned = listed([str(seed) for seed in result.seeds_used_for_tuning], 20)
    not_shown = (
        *_TOY,
        f"The settings were tuned while looking at seeds {tuned}; expect less elsewhere." if result.seeds_used_for_tuning else None,
    )
    rows: list[tuple[Cell, ...]] = []
    for measure, models in result.over_seeds.items():
        for model, stages in models.items():
            for stage, found in stages.items():
                values = (found.median, found.mean, found.lowest, found.highest) if found else (None,) * 4
                rows.append((word(measure), word(model), word(stage), *map(figure, values)))
    columns = heads("measure", words_head("model"), words_head("stage"), "median", "mean", Head("lowest", note="over seeds"), "highest")
    table = Table(f"Over seeds {listed([str(seed) for seed in result.seeds], 20)}", columns, tuple(rows), folded=len(rows) > 30)
    caption = "Median over seeds; whiskers reach from the lowest to the highest seed."
    pictures = tuple(
        panel(name_of("over_seeds", measure), f"{measure} over seeds", caption, draw_over_seeds, result, measure, width=6.0)
        for measure in result.over_seeds
    )
    words = ("Whiskers and ranges are over seeds: each is a pair of models of its own. For curves by step, report one seed's own JSON.",)
    return [Section("Demo over seeds", summary, words, without_empty(not_shown), pictures, (table,))]
