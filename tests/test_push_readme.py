"""README.md as somebody left it: published to the byte, or refused with the line that is wrong, before anything is sent."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_clients import LoopbackHub
from publishers import Publisher
from push_fixtures import refused, since, stored

from lox_merge.errors import LoxMergeWarning, RequestError
from lox_merge.publish.front_matter import check_readme

LICENCE = "license: mit"
BROKEN: dict[str, tuple[tuple[str, str], list[str]]] = {
    "broken YAML": ((LICENCE, "license: [mit\nfoo"), ["README.md, line 5: its metadata are no YAML", "begins in line 3", "Correct them"]),
    "a tab": ((LICENCE, f"{LICENCE}\n\t- x"), ["README.md, line 4: its metadata are no YAML"]),
    "no block": (("---\n", ""), ["README.md has no metadata", "published without a licence"]),
    "an empty block": (("---\n", "---\n\n---\n\n"), ["README.md has no metadata"]),
    "a text for a block": (("---\n", "---\njust text\n---\n\n"), ["README.md, line 2: its metadata are no table of names and values"]),
    "a byte order mark": (("---\n", "\ufeff---\n"), ["README.md begins with a byte order mark", "Save it as UTF-8 without one"]),
    "a model index that is a number": ((LICENCE, f"{LICENCE}\nmodel-index: 5"), ["README.md: its model-index cannot be read", "take it out"]),
    "results without a task": (
        (LICENCE, f"{LICENCE}\nmodel-index:\n- name: x\n  results:\n  - foo: 1"),
        ["README.md: its model-index cannot be read", "task, dataset and metrics"],
    ),
    "a licence that the Hub does not know": ((LICENCE, "license: my-own"), ['"license" must be one of', "Correct README.md"]),
}


def _carded(publisher: Publisher, out: Path, repo: str) -> Path:
    done = publisher.run("card", out, "--repo", repo, "--license", "mit")
    assert done.returncode == 0, done.stderr
    return out / "README.md"


@pytest.mark.parametrize("case", BROKEN)
def test_metadata_that_are_broken_are_told_with_their_line(case: str, hub: LoopbackHub, publisher: Publisher, out: Path, repo: str) -> None:
    (old, new), words = BROKEN[case]
    readme = _carded(publisher, out, repo)
    readme.write_text(readme.read_text().replace(old, new, 1))
    done = publisher.run("push", out, repo)
    refused(done, *words)
    for foreign in ("ParserError", "ScannerError", "ignore_metadata_errors", "answer of the Hub"):
        assert foreign not in done.stderr
    assert repo not in hub.repositories


def test_what_is_no_utf_8_is_refused_with_its_line(publisher: Publisher, out: Path, repo: str) -> None:
    readme = _carded(publisher, out, repo)
    readme.write_bytes(readme.read_bytes().replace(b"\n---\n\n", b"\n---\n\ncaf\xe9\n", 1))
    line = readme.read_bytes().split(b"caf")[0].count(b"\n") + 1
    refused(publisher.run("push", out, repo), f"README.md, line {line}, is not UTF-8", "Save it as UTF-8")


@pytest.mark.parametrize("edited", [True, False])
def test_line_ends_stay_as_they_are(edited: bool, hub: LoopbackHub, publisher: Publisher, out: Path, repo: str) -> None:
    readme = _carded(publisher, out, repo)
    readme.write_bytes(readme.read_bytes().replace(b"## Limits", "## Limits, caf\u00e9".encode() if edited else b"## Limits").replace(b"\n", b"\r\n"))
    done = publisher.run("push", out, repo)
    assert done.returncode == 0, done.stderr
    assert stored(hub, repo)["README.md"] == readme.read_bytes()
    assert ("as it was edited" in done.stdout) == edited  # other line ends are no other text
    start = len(hub.requests)
    again = publisher.run("push", out, repo)
    assert "Nothing to upload" in again.stdout and not [request for request in since(hub, start) if "/commit/" in request.path]


def test_a_card_without_a_licence_is_warned_about() -> None:
    with pytest.warns(LoxMergeWarning, match="README.md states no licence"):
        check_readme(b"---\ntags: [lox]\n---\n# A model\n")
    with pytest.raises(RequestError, match=r"README.md, line 5: its metadata are no YAML"):
        check_readme(b"\n\n---\r\nlicense: mit\r\nx: [\r\n---\r\n")
