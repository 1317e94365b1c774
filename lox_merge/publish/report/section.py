"""What a section of the page holds: words, pictures, tables. Plain text throughout; the page escapes it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lox_merge.publish.documents.shape import Interval
from lox_merge.publish.figures.style import single_panel
from lox_merge.publish.report.numbers import UNDEFINED, number, percent, points


@dataclass(frozen=True)
class Cell:
    """text: as shown. value: what the column is sorted by and what the JSON holds; None sorts last."""

    text: str
    value: float | int | str | None = None


@dataclass(frozen=True)
class Head:
    """A column's head. note: its meaning, shown below the table."""

    text: str
    numeric: bool = True
    note: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows in the order that matters most first: a page with too many shows the first ones. folded: closed until asked for."""

    caption: str
    heads: tuple[Head, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """name: for --figure and the page's links; unique in a section. title: what it shows, in one line. caption: how to read it.

    build: makes the matplotlib figure. wide: takes the page's whole width.
    """

    name: str
    title: str
    caption: str
    build: Callable[[], Any] = field(repr=False)
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """One run, or a part of one. summary: one sentence; words: what it shows; not_shown: what nobody should read out of it.

    details: settings as pairs of name and value.
    """

    heading: str
    summary: str
    words: tuple[str, ...] = ()
    not_shown: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    details: tuple[tuple[str, str], ...] = ()


def word(text: str) -> Cell:
    return Cell(text, text)


def figure(value: float | None, form: str = ".3f") -> Cell:
    return Cell(number(value, form), value)


def count(value: int | None) -> Cell:
    return Cell(UNDEFINED if value is None else f"{value:,}", value)


def rate(value: float | None) -> Cell:
    return Cell(percent(value), value)


def change(value: float | None) -> Cell:
    return Cell(points(value), value)


def interval(ends: Interval | None) -> tuple[Cell, Cell]:
    """Two cells, low and high, of rates."""
    return (rate(None), rate(None)) if ends is None else (rate(ends[0]), rate(ends[1]))


def change_interval(ends: Interval | None) -> tuple[Cell, Cell]:
    """Two cells, low and high, of differences."""
    return (change(None), change(None)) if ends is None else (change(ends[0]), change(ends[1]))


def panel(name: str, title: str, caption: str, draw: Callable[..., None], *arguments: Any, **size: float) -> Picture:
    """A picture of one panel, drawn by draw(axes, *arguments)."""
    return Picture(name, title, caption, partial(single_panel, lambda axes: draw(axes, *arguments), **size))


def name_of(*parts: str) -> str:
    """A picture's name from words that may come from outside: letters, digits and '_' only."""
    return "_".join(filter(None, (re.sub(r"[^a-z0-9]+", "_", part.lower()).strip("_")[:40] for part in parts)))


def heads(*texts: str | Head) -> tuple[Head, ...]:
    """The first head of words, the others of numbers, unless given as Head."""
    return tuple(text if isinstance(text, Head) else Head(text, numeric=position > 0) for position, text in enumerate(texts))


def words_head(text: str) -> Head:
    return Head(text, numeric=False)


def without_empty(sentences: Sequence[str | None]) -> tuple[str, ...]:
    return tuple(sentence for sentence in sentences if sentence)
