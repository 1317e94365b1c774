"""The picture of a study of rank and alpha: safety after an attack against divergence."""

from __future__ import annotations

from typing import Any

from lox_merge.publish.documents.tuning import Tuning
from lox_merge.publish.figures.marks import draw_with_intervals, rate_axis
from lox_merge.publish.figures.style import BLUE, GREY, VERMILLION


def draw_front(axes: Any, study: Tuning) -> None:
    """Every trial by KL and ASR, the front connected with 95 % intervals, the aligned model at KL 0."""
    others = [trial for trial in study.trials if not trial.on_front]
    places, rates = [trial.divergence for trial in others], [trial.attack.rate for trial in others]
    axes.plot(places, rates, marker="D", linestyle="", color=GREY, label="beaten by another")
    front = [(trial.divergence, trial.attack.rate, trial.attack.interval) for trial in study.best]
    draw_with_intervals(axes, front, marker="s", color=BLUE, label="front, 95 % interval")
    for trial in study.best:
        if trial.attack.rate is not None:
            axes.annotate(str(trial.number), (trial.divergence, trial.attack.rate), textcoords="offset points", xytext=(5, 5), fontsize=9)
    if study.aligned.rate is not None:
        axes.plot([0], [study.aligned.rate], marker="*", markersize=12, linestyle="", color=VERMILLION, label="aligned")
    rate_axis(axes, f"ASR after {study.training.steps[-1]} attack steps")
    axes.set_xlabel("KL from aligned on harmless prompts (nats)")
