"""The pictures of a robustness comparison: ASR against steps, and the change of ASR against that of R_ft/R_align."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lox_merge.errors import WriteError

if TYPE_CHECKING:
    from lox_merge.safety.robustness import Curve, Robustness

_COLOURS = {"aligned": "tab:red", "LoX": "tab:blue", "full-rank": "tab:green", "random-subspace": "tab:orange", "gaussian": "tab:gray"}


def plot_robustness(result: Robustness, file: Path) -> None:
    """One panel per attack (ASR of the first judge against steps, one line a seed, 95 % intervals) and, last, for every model but
    aligned its ASR minus aligned's against its R_ft/R_align minus aligned's after the last step (LoX, Fig. 3). Raises WriteError.
    """
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "lox-merge"  # the same result gives the same bytes
    from matplotlib import pyplot

    judge = next(iter(result.curves[0].points[0].evaluation.verdicts))
    count = len(result.attacks) + 1
    picture, panels = pyplot.subplots(1, count, figsize=(4.2 * count, 3.8), layout="constrained", squeeze=False)
    for axes, attack in zip(panels[0], result.attacks, strict=False):
        for curve in result.curves:
            if curve.attack == attack.name:
                _draw(axes, curve, judge, labelled=curve.seed == result.seeds[0])
        axes.set(title=attack.name, xlabel="training steps", ylabel=f"ASR ({judge.partition(':')[0]})", ylim=(-0.03, 1.03))
        axes.legend(fontsize="x-small", framealpha=0.5)
    last, axes = result.settings.steps[-1], panels[0][-1]
    for position, attack in enumerate(result.attacks):
        for curve in result.curves:
            compared = result.comparison(curve, last, judge) if curve.attack == attack.name else None
            own, aligned = curve.dispersion(last), result.curve(curve.attack, "aligned", curve.seed).dispersion(last)
            if compared is not None and compared.difference is not None and own is not None and aligned is not None:
                axes.plot(own - aligned, compared.difference, marker="os^Dvx"[position % 6], color=_COLOURS.get(curve.model))
    axes.axhline(0, color="black", linewidth=0.5)
    axes.axvline(0, color="black", linewidth=0.5)
    axes.locator_params(axis="x", nbins=5)  # small changes have long tick labels
    axes.set(title=f"against aligned, after {last} steps", xlabel="change of R_ft/R_align", ylabel="change of ASR")
    try:
        picture.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    except OSError as error:
        raise WriteError(f"the plot {file} can't be written: {error.strerror}. Make room or permissions and try again.") from error
    finally:
        pyplot.close(picture)


def _draw(axes: Any, curve: Curve, judge: str, *, labelled: bool) -> None:
    found = [(point.step, point.evaluation.attack_success[judge]) for point in curve.points]
    known = [(step, figures.rate, figures.interval) for step, figures in found if figures.rate is not None and figures.interval is not None]
    below = [max(0.0, rate - interval[0]) for _, rate, interval in known]
    above = [max(0.0, interval[1] - rate) for _, rate, interval in known]
    axes.errorbar(
        [step for step, _, _ in known],
        [rate for _, rate, _ in known],
        yerr=(below, above),
        marker="o",
        capsize=3,
        color=_COLOURS.get(curve.model),
        label=curve.model if labelled else None,
    )
