"""The demo's picture: the rank search, and attack success against attack steps, one panel for each attack."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lox_merge.errors import LoxMergeWarning, OutputError
from lox_merge.lab.demo import DemoResult
from lox_merge.lab.measure import NOT_REFUSED
from lox_merge.safety.robustness import Robustness
from lox_merge.safety.starting_points import ALIGNED, HARDENED
from lox_merge.safety.types import AttackSuccess

PICTURE = "asr_against_attack_steps"
TITLES = ("Benign fine-tuning: a harmless new task", "Harmful fine-tuning: 32 forbidden requests")
# Okabe-Ito colours, told apart with every common colour blindness; markers and dashes carry the same information in grey.
# The hardened curve is drawn wide under the narrow dashed full-rank one, because in the toy the two nearly coincide.
STYLES: dict[str, dict[str, Any]] = {
    ALIGNED: {"color": "#D55E00", "marker": "o", "linestyle": "-", "linewidth": 1.8, "markersize": 5},
    HARDENED: {"color": "#0072B2", "marker": "s", "linestyle": "-", "linewidth": 3.2, "markersize": 7},
    "full-rank": {"color": "#E69F00", "marker": "^", "linestyle": "--", "linewidth": 1.6, "markersize": 5},
    "random-subspace": {"color": "#009E73", "marker": "v", "linestyle": "-.", "linewidth": 1.6, "markersize": 5},
    "gaussian": {"color": "#555555", "marker": "D", "linestyle": ":", "linewidth": 1.6, "markersize": 4},
}


@dataclass(frozen=True)
class _Line:
    """Shares with the band around them, by steps or ranks."""

    at: list[int]
    middle: list[float]
    low: list[float]
    high: list[float]


def draw_picture(results: Sequence[DemoResult], folder: Path) -> tuple[Path, ...]:
    """Save the picture as SVG and PNG in `folder` and return both paths. One result: with Wilson bands; several: medians and ranges.

    Without matplotlib: a LoxMergeWarning that names the extra to install, and no paths. Raises OutputError.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn("no picture was drawn: matplotlib is missing; pip install 'lox-merge[plot]'", LoxMergeWarning, stacklevel=2)
        return ()
    # Without a fixed salt every SVG would hold other identifiers, and the same seed another file.
    with matplotlib.rc_context({"svg.hashsalt": "lox-merge", "font.size": 10}):
        figure = Figure(figsize=(13, 5.2), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True, width_ratios=(0.8, 1, 1))
        _draw_search(panels[0], results)
        for panel, title, attacks in zip(
            panels[1:], TITLES, ([result.benign for result in results], [result.harmful for result in results]), strict=True
        ):
            for model in attacks[0].models:
                line = _over_seeds([_points(attack, model) for attack in attacks])
                _draw(panel, line, f"{model} (equal norm)" if model not in (ALIGNED, HARDENED) else model, STYLES[model])
            panel.set(title=title, xlabel="fine-tuning steps")
        for panel in panels:
            panel.set_ylim(-3, 103)
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("forbidden requests not refused (ASR, %)")
        seeds = ", ".join(str(result.recipe.seed) for result in results)
        figure.suptitle(f"How long refusal survives fine-tuning: toy models, seed{'s' * (len(results) > 1)} {seeds}", fontweight="bold")
        handles, _ = panels[1].get_legend_handles_labels()
        # As the legend's title: a label below the panels would share the legend's place.
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, title=_note(results), title_fontproperties={"size": 9}
        )
        paths = (folder / f"{PICTURE}.svg", folder / f"{PICTURE}.png")
        try:
            figure.savefig(paths[0], metadata={"Date": None})
            figure.savefig(paths[1], dpi=150)
        except OSError as error:
            raise OutputError(f"the picture cannot be written to {folder} ({error.strerror or error}); name another folder with --out.") from error
    return paths


def _note(results: Sequence[DemoResult]) -> str:
    if len(results) > 1:
        return f"Lines: medians over {len(results)} seeds. Bands: lowest to highest seed. Lower is safer."
    n = results[0].benign.curves[0].points[0].evaluation.attack_success[NOT_REFUSED].n
    return f"Bands: Wilson 95% intervals over {n} requests (rank search: {results[0].search.aligned.n}). One seed is one draw. Lower is safer."


def _draw_search(panel: Any, results: Sequence[DemoResult]) -> None:
    line = _over_seeds([[(point.rank, point.attack) for point in result.search.curve] for result in results])
    _draw(panel, line, "base + Proj_r(delta)", {"color": "black", "marker": "o", "linestyle": "-", "linewidth": 1.8, "markersize": 4})
    aligned = [rate for result in results if (rate := result.search.aligned.rate) is not None]
    if aligned:
        panel.axhline(100 * statistics.median(aligned), color=STYLES[ALIGNED]["color"], linestyle="--", linewidth=1.2, label="aligned")
    found = [result.search.effective_rank for result in results if result.search.effective_rank is not None]
    if found:
        panel.axvline(statistics.median_low(found), color="#009E73", linewidth=1.2, label=f"effective rank {statistics.median_low(found)}")
    panel.set(title="Rank search", xlabel="rank r of base + Proj_r(delta)")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.legend(frameon=False, fontsize=9)


def _points(attack: Robustness, model: str) -> list[tuple[int, AttackSuccess]]:
    curve = attack.curve(attack.attacks[0].name, model, attack.seeds[0])
    return [(point.step, point.evaluation.attack_success[NOT_REFUSED]) for point in curve.points]


def _over_seeds(found: Sequence[Sequence[tuple[int, AttackSuccess]]]) -> _Line:
    line = _Line([], [], [], [])
    for same in zip(*found, strict=True):
        known = [(figures.rate, figures.interval) for _, figures in same if figures.rate is not None and figures.interval is not None]
        if not known:
            continue
        rates = [100 * rate for rate, _ in known]
        low, high = (min(rates), max(rates)) if len(found) > 1 else (100 * known[0][1][0], 100 * known[0][1][1])
        line.at.append(same[0][0])
        line.middle.append(statistics.median(rates))
        line.low.append(low)
        line.high.append(high)
    return line


def _draw(panel: Any, line: _Line, label: str, style: dict[str, Any]) -> None:
    panel.plot(line.at, line.middle, label=label, **style)
    panel.fill_between(line.at, line.low, line.high, color=style["color"], alpha=0.15, linewidth=0)
