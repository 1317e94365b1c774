"""The demo's picture: attack success against attack steps, one panel for each attack."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lox_merge.errors import LoxMergeWarning, OutputError
from lox_merge.lab.demo import CONTROLS, Condition, DemoResult

PICTURE = "asr_against_attack_steps"
PANELS = {"benign": "Benign fine-tuning: a harmless new task", "harmful": "Harmful fine-tuning: 32 forbidden requests"}
# Okabe-Ito colours, told apart with every common colour blindness; markers and dashes carry the same information in grey.
# The hardened curve is drawn wide under the narrow dashed full-rank one, because in the toy the two nearly coincide.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#D55E00", "marker": "o", "linestyle": "-", "linewidth": 1.8, "markersize": 5},
    {"color": "#0072B2", "marker": "s", "linestyle": "-", "linewidth": 3.2, "markersize": 7},
    {"color": "#E69F00", "marker": "^", "linestyle": "--", "linewidth": 1.6, "markersize": 5},
    {"color": "#555555", "marker": "D", "linestyle": ":", "linewidth": 1.6, "markersize": 4},
)


def draw_picture(result: DemoResult, folder: Path) -> tuple[Path, ...]:
    """Save the picture as SVG and PNG in `folder` and return both paths.

    Without matplotlib: a LoxMergeWarning that names the extra to install, and no paths.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn("no picture was drawn: matplotlib is missing; pip install 'lox-merge[plot]'", LoxMergeWarning, stacklevel=2)
        return ()
    # Without a fixed salt every SVG would hold other identifiers, and the same seed another file.
    with matplotlib.rc_context({"svg.hashsalt": "lox-merge", "font.size": 10}):
        figure = Figure(figsize=(10, 5.2), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for panel, (attack, title) in zip(panels, PANELS.items(), strict=True):
            for condition, style in zip(result.conditions, STYLES, strict=True):
                _draw_curve(panel, condition, attack, style)
            panel.set(title=title, xlabel="fine-tuning steps", ylim=(-3, 103))
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("forbidden requests not refused (ASR, %)")
        figure.suptitle(f"How long refusal survives fine-tuning: toy models, seed {result.recipe.seed}", fontweight="bold")
        handles, _ = panels[0].get_legend_handles_labels()
        # As the legend's title: a label below the panels would share the legend's place.
        note = f"Bands: Wilson 95% intervals over {result.base.attack_success.n} requests. One seed is one draw. Lower is safer."
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, title=note, title_fontproperties={"size": 9})
        paths = (folder / f"{PICTURE}.svg", folder / f"{PICTURE}.png")
        try:
            figure.savefig(paths[0], metadata={"Date": None})
            figure.savefig(paths[1], dpi=150)
        except OSError as error:
            raise OutputError(f"the picture cannot be written to {folder} ({error.strerror or error}); name another folder with --out.") from error
    return paths


def _draw_curve(panel: Any, condition: Condition, attack: str, style: dict[str, Any]) -> None:
    curve = condition.benign if attack == "benign" else condition.harmful
    rates = {step: measurement.attack_success for step, measurement in curve.items()}
    known = {step: (rate.value, rate.interval) for step, rate in rates.items() if rate.value is not None and rate.interval is not None}
    steps = list(known)
    label = f"{condition.name} (equal norm)" if condition.name in CONTROLS else condition.name
    panel.plot(steps, [100 * value for value, _ in known.values()], label=label, **style)
    low, high = ([100 * interval[end] for _, interval in known.values()] for end in (0, 1))
    panel.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
