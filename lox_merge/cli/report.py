"""`lox-merge report`: one page, or single pictures, from the JSON of runs."""

from __future__ import annotations

from pathlib import Path

import click

from lox_merge.cli.options import GIVEN_PATH, json_option
from lox_merge.errors import RequestError

DEFAULT_PAGE = Path("report.html")


@click.command("report", short_help="One self-contained page, or pictures for papers, from the JSON of runs.")
@click.argument("runs", nargs=-1, required=True, type=GIVEN_PATH, metavar="RUN...")
@click.option("--output", "-o", type=GIVEN_PATH, metavar="FILE", help="The page.  [default: report.html, none with --figure]")
@click.option(
    "--figure",
    "figures",
    multiple=True,
    type=GIVEN_PATH,
    metavar="NAME.svg|png|pdf",
    help="One picture alone, by the name that the page shows below it. Repeatable.",
)
@click.option("--title", default="lox-merge report", show_default=True, help="Title of the page.")
@json_option
def report_command(runs: tuple[Path, ...], output: Path | None, figures: tuple[Path, ...], title: str, json_file: str | None) -> None:
    """Make one HTML page from RUN..., the JSON that commands write with --json (or the folder of a hardened model).

    The page holds all it needs: no network, no scripts or fonts from elsewhere, under 2 MB. It says in words what the runs show
    and what they do not. The same runs give the same bytes.

    \b
    lox-merge report harden.json search.json robustness.json -o report.html
    lox-merge report inspect.json --figure r_align.pdf --figure spectra.svg
    """
    from lox_merge.cli.write_report import write_report

    page = output if output is not None or figures else DEFAULT_PAGE
    if page is not None and page.suffix.lower() not in (".html", ".htm"):
        raise RequestError(f"--output {page}: the page is HTML; the name must end in .html. Single pictures are asked for with --figure NAME.svg.")
    write_report(runs, page, figures, title, json_file)
