"""The terminal that tables go to. Names of models, categories and tokens are other people's texts, and are shown as they are."""

from __future__ import annotations

from rich.console import Console


def plain_console() -> Console:
    """Standard output without rich's markup: it takes `[v1]` of a name away, fails on `[/INST]`, and makes a picture of `:key:`."""
    return Console(markup=False, emoji=False, highlight=False)
