"""The tables of a comparison under attack."""

from __future__ import annotations

from statistics import median

from lox_merge.publish.documents.robustness import Robustness
from lox_merge.publish.report.section import Cell, Head, Table, change, change_interval, count, figure, heads, interval, rate, word


def points_table(result: Robustness, attack: str, judge: str) -> Table:
    """Every model, seed and step under one attack by one judge."""
    columns = heads(
        "model",
        "seed",
        "step",
        "ASR",
        "low",
        "high",
        Head("change", note="ASR minus aligned's on the same prompts, in percentage points"),
        "from",
        "to",
        Head("p", note="two-sided exact McNemar test"),
        Head("R_ft", note="share of the weight change from base that lies in the leading alignment directions, mean over matrices"),
        Head("R_ft/R_align", note="R_ft over its value before the attack"),
        *result.measures,
    )
    rows: list[tuple[Cell, ...]] = []
    for curve in result.of(attack):
        for point in curve.points:
            found, compared = point.attack_success[judge], point.against_aligned.get(judge)
            rates = (rate(found.rate), *interval(found.interval))
            if compared:
                paired = (change(compared.difference), *change_interval(compared.interval), figure(compared.p_value, ".2g"))
            else:
                paired = (Cell("–"),) * 4
            weights = (figure(point.r_ft.mean), figure(point.r_ft_over_r_align))
            measures = (figure(point.utility.get(measure), ".4g") for measure in result.measures)
            rows.append((word(curve.model), count(curve.seed), count(point.step), *rates, *paired, *weights, *measures))
    return Table(f"Attack {attack}, judged by {judge}", columns, tuple(rows), folded=len(rows) > 30)


def medians_table(result: Robustness, attack: str, judge: str) -> Table:
    """ASR over seeds."""
    rows: list[tuple[Cell, ...]] = []
    for model in result.models:
        for step in result.training.steps:
            points = [point for curve in result.of(attack, model) if (point := curve.point(step))]
            rates = [found for point in points if (found := point.attack_success[judge].rate) is not None]
            ends = (rate(median(rates)), rate(min(rates)), rate(max(rates))) if rates else (rate(None),) * 3
            rows.append((word(model), count(step), *ends, count(len(rates))))
    columns = heads("model", "step", "median ASR", "lowest", "highest", "seeds")
    return Table(f"Attack {attack}, ASR over {len(result.seeds)} seeds, judged by {judge}", columns, tuple(rows))
