"""How pictures look: colours told apart with every common colour blindness, and marks and dashes that say the same in grey."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Okabe and Ito's colours (jfly.uni-koeln.de/color). A page swaps each for one that suits its background; see svg.py.
INK, RULE = "#1a1a1a", "#c9c9c9"
VERMILLION, BLUE, GREEN, ORANGE, PURPLE, SKY, GREY = "#d55e00", "#0072b2", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#555555"

# Models have one look in every picture. LoX is drawn wide, under the narrow line of a control that may coincide with it.
_MODELS: dict[str, dict[str, Any]] = {
    "aligned": {"color": VERMILLION, "marker": "o", "linestyle": "-"},
    "LoX": {"color": BLUE, "marker": "s", "linestyle": "-", "linewidth": 2.8},
    "full-rank": {"color": ORANGE, "marker": "^", "linestyle": "--"},
    "random-subspace": {"color": PURPLE, "marker": "v", "linestyle": "-."},
    "gaussian": {"color": GREY, "marker": "D", "linestyle": ":"},
}
_SERIES: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "marker": "s", "linestyle": "-"},
    {"color": VERMILLION, "marker": "o", "linestyle": "--"},
    {"color": GREEN, "marker": "^", "linestyle": "-."},
    {"color": PURPLE, "marker": "v", "linestyle": ":"},
    {"color": ORANGE, "marker": "D", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    {"color": SKY, "marker": "P", "linestyle": (0, (1, 1))},
    {"color": GREY, "marker": "X", "linestyle": (0, (6, 3))},
)

_SETTINGS = {
    "svg.hashsalt": "lox-merge",  # the same document gives the same bytes
    "text.parse_math": False,  # names come from outside: a dollar in one is no formula
    "pdf.fonttype": 42,  # what journals ask for
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "figure.constrained_layout.use": True,
}


@contextmanager
def house_style() -> Iterator[None]:
    """matplotlib's defaults with ours on top, whatever the user's own settings are: pictures do not differ between machines."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a name in another script
        yield


def model_style(model: str, position: int = 0) -> dict[str, Any]:
    """Colour, marker and dashes of a model; of one without a look of its own, by its position."""
    return _MODELS.get(model) or series_style(position)


def series_style(position: int) -> dict[str, Any]:
    return _SERIES[position % len(_SERIES)]


def label(text: str, length: int = 36) -> str:
    """A name from outside, short enough for a legend, and shown even where matplotlib hides names that begin with '_'."""
    short = text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[-(length // 2) :]}"
    return f" {short}" if short.startswith("_") else short


def single_panel(draw: Callable[[Any], None], *, width: float = 4.8, height: float = 3.2) -> Any:
    """A figure (inches, legend not counted) with one panel, which `draw` fills. Width of a paper's column, and of a telephone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    draw(figure.subplots())
    legend_below(figure)
    return figure


def legend_below(figure: Any) -> None:
    """One legend for all panels, under them, where it hides nothing; the figure grows by its height."""
    found = {text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    if found:
        # Inches, generously, of a letter and of the sample of a line before it.
        columns = min(len(found), max(1, int(figure.get_figwidth() / (0.55 + 0.07 * max(map(len, found))))))
        figure.set_figheight(figure.get_figheight() + 0.1 + 0.19 * -(-len(found) // columns))
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, columnspacing=1.2, handlelength=2.8)
