"""The work of `lox-merge report`: everything checked first, then pictures and page written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from lox_merge.cli.json_file import write_json
from lox_merge.errors import OutputError, RequestError
from lox_merge.jobs.atomic import write_atomically
from lox_merge.publish.figures.save import check_matplotlib, check_output_file, check_picture_file, save_picture
from lox_merge.publish.report.page import Report, make_report, render
from lox_merge.publish.report.runs import read_run


def write_report(runs: Sequence[Path], page: Path | None, figures: Sequence[Path], title: str, json_file: str | None) -> None:
    """Raises RequestError before anything is written, WriteError afterwards."""
    check_matplotlib("report")
    if page is not None:
        check_output_file(page, "--output")
    for file in figures:
        check_picture_file(file, "--figure")
    _check_no_source(runs, [*figures, *([page] if page is not None else [])])
    report = make_report([read_run(path) for path in runs])
    unknown = [file.name for file in figures if file.stem not in report.pictures]
    if unknown:
        raise RequestError(f"--figure {', '.join(unknown)}: there is no such picture. These runs have: {', '.join(report.pictures) or 'none'}.")
    html = render(report, title) if page is not None else None
    for file in figures:
        save_picture(report.pictures[file.stem].build, file)
    if page is not None and html is not None:
        write_atomically(page, html, page.resolve().parent)
    if json_file:
        write_json(json_file, _document(report, page, html), left="The page and pictures are complete.")
    if json_file != "-":
        for file in figures:
            click.echo(f"Written: {file}")
        if html is not None:
            sections, pictures = len(report.sections), len(report.pictures)
            counted = f"{sections} section{'s' * (sections != 1)}, {pictures} picture{'s' * (pictures != 1)}"
            click.echo(f"Written: {page} ({counted}, {len(html) / 1000:.0f} kB)")


def _check_no_source(runs: Sequence[Path], outputs: Sequence[Path]) -> None:
    resolved = [file.resolve() for file in outputs]
    for file in outputs:
        if resolved.count(file.resolve()) > 1:
            raise OutputError(f"{file} is named twice. Give each output a name of its own.")
        if file.resolve() in [run.resolve() for run in runs]:
            raise OutputError(f"{file} is one of the runs; it would be replaced. Choose another name.")


def _document(report: Report, page: Path | None, html: bytes | None) -> dict[str, Any]:
    return {
        "command": "report",
        "output": page.name if page is not None else None,
        "bytes": len(html) if html is not None else None,
        "runs": [{"name": run.name, "sha256": run.sha256, "command": run.command} for run in report.runs],
        "sections": [{"heading": section.heading, "summary": section.summary} for section in report.sections],
        "figures": list(report.pictures),
    }
