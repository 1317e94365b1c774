"""The page: sections into one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources

from jinja2 import Environment
from markupsafe import Markup, escape

from lox_merge._version import __version__
from lox_merge.errors import RequestError
from lox_merge.publish.figures.svg import inline_svg
from lox_merge.publish.report.registry import sections_of
from lox_merge.publish.report.runs import Run
from lox_merge.publish.report.section import Picture, Section, Table

# What a mail or a code review still takes.
LARGEST_PAGE = 2_000_000
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*(?: \d[\d,]*)?")
# Rows shown of each table; the next number is tried where a page would be too large.
_ROWS = (1000, 300, 100, 30)


@dataclass(frozen=True)
class Report:
    """Sections in order with their runs, and every picture by its name, which is unique here."""

    runs: tuple[Run, ...]
    sections: tuple[Section, ...]
    run_of: tuple[Run, ...] = field(repr=False)
    names: tuple[tuple[str, ...], ...] = field(repr=False)

    @property
    def pictures(self) -> dict[str, Picture]:
        return {
            name: picture
            for names, section in zip(self.names, self.sections, strict=True)
            for name, picture in zip(names, section.pictures, strict=True)
        }


def make_report(runs: Sequence[Run]) -> Report:
    """Raises RequestError for no run, or one that no section can be made of."""
    if not runs:
        raise RequestError("no run is given. Name at least one JSON file of a command.")
    found = [(run, section) for run in runs for section in sections_of(run)]
    taken: set[str] = set()

    def unique(name: str) -> str:
        number, chosen = 1, name
        while chosen in taken:
            number += 1
            chosen = f"{name}_{number}"
        taken.add(chosen)
        return chosen

    names = tuple(tuple(unique(picture.name) for picture in section.pictures) for _, section in found)
    return Report(tuple(runs), tuple(section for _, section in found), tuple(run for run, _ in found), names)


def render(report: Report, title: str) -> bytes:
    """The page in UTF-8, the same bytes for the same runs. Raises RequestError where it would be above 2 MB."""
    drawings = {name: Markup(inline_svg(picture.build, name, picture.title)) for name, picture in report.pictures.items()}
    page = b""
    for most in _ROWS:
        page = _render(report, title, drawings, most)
        if len(page) < LARGEST_PAGE:
            return page
    raise RequestError(
        f"the page of {len(report.runs)} run(s) with {len(drawings)} pictures would be {len(page) / 1e6:.1f} MB, above 2 MB. "
        "Make several reports of fewer runs each."
    )


def _render(report: Report, title: str, drawings: dict[str, Markup], most: int) -> bytes:
    style, script = (_resource(name) for name in ("page.css", "page.js"))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["prose"] = _prose
    template = environment.from_string(_resource("page.html.jinja"))
    chapters = [
        {"section": section, "run": run, "anchor": f"section-{place}", "names": names, "tables": [_shown(table, most) for table in section.tables]}
        for place, (section, run, names) in enumerate(zip(report.sections, report.run_of, report.names, strict=True), 1)
    ]
    # The page's own script and no other may run, whatever a name in the JSON looks like.
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = template.render(
        title=title,
        chapters=chapters,
        runs=report.runs,
        drawings=drawings,
        style=Markup(style),
        script=Markup(script),
        allowed=allowed,
        version=__version__,
    )
    return text.encode("utf-8")


def _prose(text: str) -> Markup:
    """A sentence whose lines do not break inside an option of the command line, or before a sign of percent."""
    joined = str(escape(text)).replace(" %", "\N{NO-BREAK SPACE}%")
    return Markup(_OPTION.sub(r'<span class="option">\g<0></span>', joined))


def _shown(table: Table, most: int) -> dict[str, object]:
    return {"table": table, "rows": table.rows[:most], "left_out": max(0, len(table.rows) - most)}


def _resource(name: str) -> str:
    return (resources.files("lox_merge.publish.report") / name).read_text(encoding="utf-8")
