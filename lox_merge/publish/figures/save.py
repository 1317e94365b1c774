"""Pictures to files: SVG, PNG or PDF by the name, the same bytes for the same picture, whole or not at all."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lox_merge.errors import OutputError, RequestError
from lox_merge.jobs.atomic import write_atomically
from lox_merge.publish.figures.style import house_style

SUFFIXES = (".svg", ".png", ".pdf")
# Dots an inch of a PNG: what journals ask for.
_RESOLUTION = 300


def check_matplotlib(what: str) -> None:
    """Raises RequestError where pictures cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError(f"{what} needs matplotlib. Install it: pip install 'lox-merge[plot]'")


def check_output_file(file: Path, option: str) -> None:
    """Raises OutputError where `file` could not be written at the end of long work."""
    if not file.resolve().parent.is_dir():
        raise OutputError(f"{option} {file}: there is no folder {file.parent}. Make it, or choose another one.")
    if file.is_dir():
        raise OutputError(f"{option} {file} is a folder. Name a file.")


def check_picture_file(file: Path, option: str) -> None:
    """Raises RequestError where the picture could not be drawn or written."""
    if file.suffix.lower() not in SUFFIXES:
        raise RequestError(f"{option} {file}: the name must end in .svg, .png or .pdf.")
    check_output_file(file, option)
    check_matplotlib(option)


def save_picture(build: Callable[[], Any], file: Path) -> None:
    """Writes the figure that `build` makes, replacing what was there. Raises WriteError."""
    kind, data = file.suffix.lower()[1:], io.BytesIO()
    # A date would make every file another one.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with house_style():
        build().savefig(data, format=kind, metadata=metadata, dpi=_RESOLUTION)
    write_atomically(file, data.getvalue(), file.resolve().parent)
