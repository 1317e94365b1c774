"""JSON that others may have written, where results are asked for: what cannot be read is refused with words (fields: test_card_wrong_results)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lox_merge.errors import RequestError
from lox_merge.jobs.output_folder import MANIFEST
from lox_merge.publish import upload
from lox_merge.publish.output import FinishedOutput
from lox_merge.publish.push import _reasons
from lox_merge.publish.readme import existing_card
from lox_merge.publish.report.runs import read_run
from lox_merge.publish.results import Subject, read_results

SUBJECT = Subject(("out",), "0", {"rank": "6", "alpha": 1.25}, {"base": {}, "aligned": {}})


@pytest.mark.parametrize("text", ["[" * 100_000, '{"command": ' + "[" * 900 + "]" * 900 + "}", '{"command": "\\ud800"}', "\ufeff{}", "9" * 5000])
def test_json_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(RequestError, match=r"--results r\.json cannot be read: it is no JSON"):
        read_results([tmp_path / "r.json"], SUBJECT)


def test_a_command_that_is_no_name(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"command": []}')
    with pytest.raises(RequestError, match="no result of lox-merge asr"):
        read_results([tmp_path / "r.json"], SUBJECT)


def test_reports_of_deep_json(tmp_path: Path) -> None:
    """Some levels are less deep than the parser's own limit, and deeper than what makes texts printable: where, depends on Python."""
    for depth in (100, 300, 450, 700, 900, 980, 100_000):
        (tmp_path / "r.json").write_text('{"command": "asr", "x": ' + "[" * depth + "]" * depth + "}")
        try:
            assert read_run(tmp_path / "r.json").command == "asr" and depth < 100_000
        except RequestError as error:
            assert "is not JSON" in str(error) and depth > 100


def test_deep_json_of_a_card_and_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = '{"output": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (tmp_path / "README.md").write_text(f"card\n<!-- lox-merge card {deep} -->\n")
    card = existing_card(FinishedOutput(tmp_path, {}, "0", ()))
    assert card is not None and not card.ours
    assert _reasons(deep) == deep
    (tmp_path / MANIFEST).write_text(deep)
    monkeypatch.setattr(upload, "hub_api", lambda: SimpleNamespace(hf_hub_download=lambda *_, **__: str(tmp_path / MANIFEST)))
    assert upload.files_of_earlier_output("me/model", upload.Remote("0", {MANIFEST: "0"})) == frozenset()
