"""The picture of a rank search."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from lox_merge.errors import RequestError, WriteError

if TYPE_CHECKING:
    from lox_merge.safety.search import RankSearch


def check_plot(file: Path) -> None:
    """Raises RequestError where the picture could not be drawn at the end of a long search."""
    if file.suffix not in (".svg", ".png"):
        raise RequestError(f"--plot {file}: the name must end in .svg or .png.")
    if not file.resolve().parent.is_dir():
        raise RequestError(f"--plot {file}: there is no folder {file.parent}. Make it, or choose another one.")
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib. Install it: pip install 'lox-merge[plot]'")


def plot_search(result: RankSearch, file: Path) -> None:
    """ASR against rank with its interval, the threshold, the aligned model's ASR and R_align, as SVG or PNG by the suffix.

    Raises WriteError.
    """
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "lox-merge"  # the same search gives the same bytes
    from matplotlib import pyplot

    measured = [point for point in result.curve if point.attack.rate is not None and point.attack.interval is not None]
    ranks = [point.rank for point in measured]
    rates = [point.attack.rate or 0.0 for point in measured]
    intervals = [point.attack.interval or (0.0, 0.0) for point in measured]
    below = [max(0.0, rate - low) for rate, (low, _) in zip(rates, intervals, strict=True)]
    above = [max(0.0, high - rate) for rate, (_, high) in zip(rates, intervals, strict=True)]
    picture, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    axes.errorbar(ranks, rates, yerr=(below, above), marker="o", capsize=3, color="tab:red", label="ASR, 95 % interval")
    if result.aligned.rate is not None:
        axes.axhline(result.aligned.rate, color="tab:gray", linestyle=":", label="ASR of the aligned model")
        axes.axhline(result.aligned.rate + result.rho, color="tab:green", linestyle="--", label=f"threshold, rho = {result.rho:g}")
    ratios = [(point.rank, point.mean_r_align) for point in result.curve if point.mean_r_align is not None]
    axes.plot([rank for rank, _ in ratios], [ratio for _, ratio in ratios], marker=".", color="tab:blue", alpha=0.7, label="mean R_align")
    matches = [(point.rank, point.utility["exact match"]) for point in result.curve if point.utility.get("exact match") is not None]
    if matches:  # the one utility that is a rate, as the axis is
        axes.plot([rank for rank, _ in matches], [rate for _, rate in matches], marker=".", color="tab:orange", linestyle="-.", label="exact match")
    if result.effective_rank is not None:
        axes.axvline(result.effective_rank, color="tab:green", alpha=0.4, label=f"effective rank {result.effective_rank}")
    axes.set(xlabel="rank r of base + Proj_r(delta)", ylabel="rate", ylim=(-0.03, 1.03))
    axes.legend(fontsize="small")
    try:
        picture.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    except OSError as error:
        raise WriteError(f"the plot {file} can't be written: {error.strerror}. Make room or permissions and try again.") from error
    finally:
        pyplot.close(picture)
