"""Checks every command shown in README.md and docs/: that the program knows it, with these options and arguments.

Blocks fenced as ```sh are read line by line; `lox-merge …` is parsed by the real command (nothing runs), `make …` has to be
a target of the Makefile, `python FILE …` has to name a file of the repository. tests/test_docs.py runs what it can.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import click

from lox_merge.cli.main import cli

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Commands that hand their options to another program.
_FORWARDED = {"yaml"}


def commands(text: str) -> list[str]:
    """The commands of a page, continuation lines joined, comments left out."""
    found = []
    for block in _BLOCK.findall(text):
        joined = block.replace("\\\n", " ")
        found += [line.split(" #")[0].strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return found


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def problem(command: str) -> str | None:
    """What is wrong with a command, None if nothing is."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return None if set(words[1:]) <= set(targets) else "no such make target"
    if words[0] == "python":
        return None if words[1] == "-m" or (ROOT / words[1]).is_file() else "no such file"
    if words[0] != "lox-merge":
        return None
    context = click.Context(cli)
    command_object = cli.get_command(context, words[1])
    if command_object is None:
        return "no such command"
    if words[1] in _FORWARDED:
        return None
    try:
        command_object.make_context(words[1], words[2:], parent=context, resilient_parsing=False)
    except click.exceptions.Exit:
        return None
    except click.ClickException as error:
        return error.format_message()
    return None


def main() -> None:
    checked, wrong = 0, []
    for page in pages():
        for command in commands(page.read_text(encoding="utf-8")):
            checked += 1
            reason = problem(command)
            if reason:
                wrong.append(f"{page.relative_to(ROOT)}: {command}: {reason}")
    print("\n".join([*wrong, f"{checked} documented commands, {len(wrong)} wrong"]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
