"""The file of --json: checked before any work, written after the table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from lox_merge.errors import OutputError, WriteError
from lox_merge.home_paths import expanded
from lox_merge.jobs.atomic import json_bytes, write_atomically
from lox_merge.publish.figures.save import check_output_file


def check_json_file(file: Path, others: Sequence[Any]) -> None:
    """others: values of the other options and arguments. Raises OutputError where `file` could not be written, or is what one of them names."""
    if _is_special(file):
        return
    texts = [str(one) for value in others for one in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(one, (str, Path))]
    # FILE, NAME=FILE, python:FILE:NAME
    named = {Path(part).resolve(): part for text in texts for part in (text, text.partition("=")[2], *text.split(":")) if part}
    target = file.resolve()
    if file.is_dir() or target.parent not in named:  # a folder that another option names may be one that is yet to be made
        check_output_file(file, "--json")
    if target in named:
        raise OutputError(
            f"--json {file}: another option or argument names this file too ({named[target]}); the result would replace it. Choose another name."
        )


def write_json(file: str, value: dict[str, Any], *, left: str = "The output itself is complete.") -> None:
    """Writes JSON to a file, or to standard output for '-'. left: what is there all the same where that fails. Raises WriteError."""
    data = json_bytes(value)
    if file == "-":
        # What standard output cannot hold is written in JSON's own escapes.
        universal = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        click.echo(data.decode() if universal else json.dumps(value, indent=2, allow_nan=False) + "\n", nl=False)
        return
    path = expanded(file)
    try:
        if _is_special(path):
            path.write_bytes(data)
        else:
            write_atomically(path, data, path.resolve().parent)
    except (OSError, WriteError) as error:
        reason = error.strerror if isinstance(error, OSError) else getattr(error.__cause__, "strerror", None)
        raise WriteError(f"the JSON file {file} can't be written: {reason or error}. {left}") from error


def give_result(json_file: str | None, document: Mapping[str, Any], show: Callable[[], None]) -> None:
    """A measurement's table, then its JSON: a file that can't be written takes no figures away, nor does a table that can't be shown."""
    try:
        if json_file != "-":
            show()
    finally:
        if json_file:
            write_json(json_file, dict(document), left="The figures are in the table above; --json - writes all of them to standard output.")


def _is_special(path: Path) -> bool:
    """Whether it is /dev/stdout, /dev/null, a pipe or a link: what it leads to is written, not replaced."""
    return not path.is_dir() and (path.is_symlink() or (path.exists() and not path.is_file()))
