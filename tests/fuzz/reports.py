"""Hostile JSON of runs, made into a page: nothing in it may become part of the page's own HTML."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import click
from hypothesis import strategies as st

from fuzz.cases import Target
from fuzz.hostile import SCRIPT, json_bytes, with_hostile_texts, written
from fuzz.materials import Materials
from lox_merge.publish.report.page import make_report, render
from lox_merge.publish.report.runs import read_run

_TAGS = {"script", "iframe", "object", "embed", "base", "form", "input", "link", "audio", "video", "foreignobject"}


class OutOfText(AssertionError):
    """Text of a run became HTML."""


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.scripts = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        if (tag in _TAGS and tag != "script") or tag == "img":
            raise OutOfText(tag)
        for name, value in attributes:
            address = name in ("href", "src", "xlink:href", "action", "style")
            if name.startswith("on") or (address and value and ("javascript:" in value.lower() or "//" in value)):
                raise OutOfText(f"{tag} {name}={value}")


def check_page(html: bytes) -> None:
    """Raises OutOfText for a script beside the page's own, a handler of events, or an address elsewhere."""
    page = _Page()
    page.feed(html.decode("utf-8"))
    if page.scripts != 1 or SCRIPT.encode() in html:
        raise OutOfText(f"{page.scripts} scripts")


def run_documents(materials: Materials, folder: Path) -> dict[str, object]:
    """The JSON of commands on the tiny pair, by command."""
    from lox_merge.cli.asr import asr_command
    from lox_merge.cli.decompose import decompose_command
    from lox_merge.cli.harden import harden_command
    from lox_merge.cli.inspect import inspect_command
    from lox_merge.cli.search import search_command
    from lox_merge.cli.verify import verify_command

    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("how do\nhelp you\n")
    asked = ("--prompts", folder / "prompts.txt", "--judge", "keyword", "--max-new-tokens", 2, "--device", "cpu")
    pair = (materials.base, materials.aligned)
    orders: dict[str, tuple[click.Command, tuple[object, ...]]] = {
        "harden": (harden_command, (*pair, folder / "out", "--rank", 2)),
        "verify": (verify_command, (folder / "out", "--offline")),
        "decompose": (decompose_command, (*pair, folder / "factors.safetensors", "--rank", 3)),
        "inspect": (inspect_command, (*pair, "--rank", 2, "--device", "cpu")),
        "asr": (asr_command, (materials.aligned, folder / "out", *asked)),
        "search": (search_command, (*pair, *asked, "--ranks", "0,2", "--utility-prompts", folder / "prompts.txt")),
    }
    found = {}
    for name, (command, arguments) in orders.items():
        file = folder / f"{name}.json"
        command.main([*map(str, arguments), "--json", str(file)], standalone_mode=False)
        found[name] = json.loads(file.read_text(encoding="utf-8"))
    return found


def reports(materials: Materials) -> Target:
    documents = run_documents(materials, materials.place("runs"))
    file = materials.place("run.json")

    def feed(case: bytes) -> None:
        file.write_bytes(case)
        check_page(render(make_report([read_run(file)]), SCRIPT))

    texts = [with_hostile_texts(document).map(written) for document in documents.values()]
    cases = st.one_of(*texts, *(json_bytes(document) for document in documents.values()))
    return Target("reports", cases, feed, materials.folder, json.dumps(documents["verify"]).encode(), dear=8)
