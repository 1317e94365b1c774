"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path


def expanded(path: str | Path) -> Path:
    """`path` with the home folder in place of `~`; as it is where there is none, so that whoever looks for it says so."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
