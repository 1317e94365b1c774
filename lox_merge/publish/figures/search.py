"""The picture of a rank search: LoX (arXiv 2506.15606), App. C."""

from __future__ import annotations

from typing import Any

from lox_merge.publish.documents.search import Search
from lox_merge.publish.figures.marks import draw_with_intervals, rate_axis
from lox_merge.publish.figures.style import BLUE, GREEN, GREY, ORANGE, VERMILLION


def draw_rank_curve(axes: Any, search: Search) -> None:
    """ASR against rank with its interval, the threshold, the aligned model's ASR and R_align."""
    asr = [(point.rank, point.attack.rate, point.attack.interval) for point in search.curve]
    draw_with_intervals(axes, asr, marker="o", color=VERMILLION, label="ASR, 95 % interval")
    if search.aligned.rate is not None:
        axes.axhline(search.aligned.rate, color=GREY, linestyle=":", label="ASR of the aligned model")
        axes.axhline(search.aligned.rate + search.rho, color=GREEN, linestyle="--", label=f"threshold, rho = {search.rho:g}")
    ratios = [(point.rank, point.mean_r_align) for point in search.curve if point.mean_r_align is not None]
    axes.plot([rank for rank, _ in ratios], [ratio for _, ratio in ratios], marker=".", color=BLUE, label="mean R_align")
    matches = [(point.rank, point.utility["exact match"]) for point in search.curve if point.utility.get("exact match") is not None]
    if matches:  # the one utility that is a rate, as the axis is
        axes.plot([rank for rank, _ in matches], [rate for _, rate in matches], marker="x", color=ORANGE, linestyle="-.", label="exact match")
    if search.effective_rank is not None:
        axes.axvline(search.effective_rank, color=GREEN, alpha=0.5, linewidth=3, label=f"effective rank {search.effective_rank}")
    rate_axis(axes, "rate")
    axes.set_xlabel("rank r of base + Proj_r(delta)")
    axes.xaxis.get_major_locator().set_params(integer=True)
