"""The picture of a card: attack success of aligned and hardened, against fine-tuning steps where an attack was run."""

from __future__ import annotations

import io
import warnings
from typing import Any

from lox_merge.errors import LoxMergeWarning
from lox_merge.publish.documents.robustness import HARDENED
from lox_merge.publish.results import AttackPoint, Measured

PICTURE = "lox_merge_asr.svg"
_STYLES = {
    "aligned": ("#D55E00", "o", "-", "aligned (before)"),
    HARDENED: ("#0072B2", "s", "-", "this model"),
    "full-rank": ("#E69F00", "^", "--", "control: full-rank"),
    "random-subspace": ("#009E73", "v", "--", "control: random subspace"),
    "gaussian": ("#555555", "D", ":", "control: gaussian"),
}


def draw(measured: Measured) -> bytes | None:
    """An SVG, the same for the same figures; None without results, and (with a LoxMergeWarning) without matplotlib."""
    if not measured:
        return None
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn("the card has no picture: matplotlib is missing; pip install 'lox-merge[plot]'.", LoxMergeWarning, stacklevel=2)
        return None
    # Without a fixed salt every SVG would hold other identifiers, and the same results another file. Names come from outside: a dollar
    # in one is no formula.
    with matplotlib.rc_context({"svg.hashsalt": "lox-merge", "font.size": 10, "text.parse_math": False}):
        attacks = measured.compared
        figure = Figure(figsize=(max(6.0, 4.8 * len(attacks)), 4.0), layout="constrained")
        if attacks:
            panels = figure.subplots(1, len(attacks), sharey=True, squeeze=False)[0]
            for panel, points in zip(panels, attacks, strict=True):
                _curves(panel, points)
                panel.set(title=f"{points[0].attack}, judged by {points[0].judge}", xlabel="fine-tuning steps")
        else:
            panels = [figure.subplots()]
            _bars(panels[0], measured)
        panels[0].set_ylabel("attack success rate (lower is safer)")
        for panel in panels:
            panel.set_ylim(-0.03, 1.03)
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(axis="y", alpha=0.25)
        data = io.BytesIO()
        figure.savefig(data, format="svg", metadata={"Date": None})
    return data.getvalue()


def _curves(panel: Any, points: list[AttackPoint]) -> None:
    for model in dict.fromkeys(point.model for point in points):
        colour, marker, line, label = _STYLES.get(model, ("#000000", ".", "-", model))
        own = [point for point in points if point.model == model]
        for seed in range(max(len(point.figures) for point in own)):
            at_seed = [(point.step, point.figures[seed]) for point in own if seed < len(point.figures)]
            known = [(step, figures) for step, figures in at_seed if figures.rate is not None]
            rates = [figures.rate for _, figures in known]
            bounds = [figures.interval or (figures.rate, figures.rate) for _, figures in known]
            errors = [[max(0.0, rate - low) for rate, (low, _) in zip(rates, bounds, strict=True)]]  # type: ignore[operator]
            errors.append([max(0.0, high - rate) for rate, (_, high) in zip(rates, bounds, strict=True)])  # type: ignore[operator]
            shown = label if seed == 0 else None
            steps = [step for step, _ in known]
            panel.errorbar(steps, rates, yerr=errors, color=colour, marker=marker, linestyle=line, capsize=3, label=shown)
    panel.legend(fontsize="small", frameon=False)


def _bars(panel: Any, measured: Measured) -> None:
    rows = [row for row in measured.asr if row.figures.rate is not None]
    names = {"base": "base", "aligned": "aligned (before)", "hardened": "this model (after)"}
    rows.sort(key=lambda row: (row.prompts.source, row.judge, list(names).index(row.role)))
    for place, row in enumerate(rows):
        rate, (low, high) = row.figures.rate or 0.0, row.figures.interval or (row.figures.rate or 0.0,) * 2
        colour = {"aligned": "#D55E00", "hardened": "#0072B2"}.get(row.role, "#999999")
        panel.bar(place, rate, color=colour, alpha=0.6)
        panel.errorbar(place, rate, yerr=[[max(0.0, rate - low)], [max(0.0, high - rate)]], color="black", capsize=4)
    panel.set_xticks(range(len(rows)), [f"{names[row.role]}\n{row.judge}" for row in rows], fontsize="small")
