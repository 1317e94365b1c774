"""Result files that others may have written, given to `card --results`: refused with words, or shown as they are."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lox_merge.errors import RequestError
from lox_merge.jobs.plan import MANIFEST
from lox_merge.publish import upload
from lox_merge.publish.evaluation import asr_table, attack_table, control_lines, paired_lines, protocol_lines, search_lines, utility_table
from lox_merge.publish.output import FinishedOutput
from lox_merge.publish.push import _reasons
from lox_merge.publish.readme import existing_card
from lox_merge.publish.report.runs import read_run
from lox_merge.publish.results import Subject, read_results

Change = Callable[[dict[str, Any]], object]
BASE, ALIGNED, HARDENED = ({"kind": "folder", "name": name} for name in ("base", "aligned", "out"))
SUBJECT = Subject(("out",), "0", {"rank": "6", "alpha": 1.25}, {"base": BASE, "aligned": ALIGNED})
PROMPTS = {"source": "p", "sha256": "e" * 64, "n": 8}
RATE = {"n": 8, "judged": 8, "undecided": 0, "rate": 0.0, "interval": [0.0, 0.3]}
KEYWORD = {"kind": "keyword"}

ONE = {"prompts": PROMPTS, "judges": {"j": KEYWORD}, "attack_success": {"j": RATE}, "utility": {"u": 0.5}}
ASR = {
    "command": "asr",
    "evaluations": [ONE | {"title": "aligned", "model": {"source": ALIGNED}}, ONE | {"title": "out", "model": {"source": HARDENED}}],
    "comparisons": [{"first": "aligned", "second": "out", "judge": "j", "n": 8, "difference": 0.0, "interval": [-0.1, 0.1], "p_value": 1.0}],
}
SEARCH = {
    **{"command": "search", "effective_rank": 4, "rho": 0.01, "confident": False, "judge": KEYWORD, "prompts": PROMPTS},
    **{"model": {"source": ALIGNED}, "aligned": RATE, "curve": [{"rank": 4}]},
}
POINT = {"step": 0, "attack_success": {"j": RATE}, "r_ft_over_r_align": 1.0, "utility": {"u": 0.5}}
ROBUSTNESS = {
    **{"command": "robustness", "sources": {"base": BASE, "aligned": ALIGNED, "hardened": HARDENED}, "recipe": {"rank": "6", "alpha": 1.25}},
    **{"training": {"lora": False, "learning_rate": 1e-3, "batch_size": 4}, "prompts": PROMPTS, "judges": {"j": KEYWORD}},
    "curves": [{"attack": "harmful", "model": model, "points": [POINT]} for model in ("aligned", "LoX")],
}


def shown(document: dict[str, Any], folder: Path) -> list[Any]:
    """Everything that a card says of one result file."""
    (folder / "r.json").write_text(json.dumps(document))
    measured = read_results([folder / "r.json"], SUBJECT)
    ways = asr_table, attack_table, utility_table, paired_lines, search_lines, control_lines, protocol_lines
    return [way(measured) for way in ways]


@pytest.mark.parametrize("document", [ASR, SEARCH, ROBUSTNESS], ids=["asr", "search", "robustness"])
def test_sound_results_are_shown(document: dict[str, Any], tmp_path: Path) -> None:
    assert any(shown(document, tmp_path))


def rate_of(document: dict[str, Any]) -> dict[str, Any]:
    if document["command"] == "search":
        return document["aligned"]  # type: ignore[no-any-return]
    holder = document["evaluations"][1] if document["command"] == "asr" else document["curves"][1]["points"][0]
    return holder["attack_success"]["j"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("document", [ASR, SEARCH, ROBUSTNESS], ids=["asr", "search", "robustness"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n", value) for value in (float("inf"), float("nan"), -1, 8.0, "8", True, None, [])),
        *(("rate", value) for value in (float("inf"), float("nan"), 1.1, -0.1, 10**400, "0", True)),
        *(("interval", value) for value in ([0.0], [0.3, 0.0], [0.0, float("nan")], [-1, 2], "01", {"0": 0, "1": 1})),
    ],
)
def test_rates_that_cannot_be(document: dict[str, Any], name: str, value: object, tmp_path: Path) -> None:
    spoilt = copy.deepcopy(document)
    rate_of(spoilt)[name] = value
    with pytest.raises(RequestError, match=r"r\.json is damaged, or of another version"):
        shown(spoilt, tmp_path)


@pytest.mark.parametrize(
    ("document", "change"),
    [
        (ASR, lambda d: d["evaluations"][1].update(prompts=[])),
        (ASR, lambda d: d["evaluations"][1].update(prompts={"source": "p", "n": 1})),
        (ASR, lambda d: d["evaluations"][1].update(prompts=PROMPTS | {"n": float("inf")})),
        (ASR, lambda d: d["evaluations"][1].update(utility={"u": "high"})),
        (ASR, lambda d: d["comparisons"][0].update(difference="x")),
        (ASR, lambda d: d["comparisons"][0].update(p_value=2)),
        (ASR, lambda d: d["comparisons"][0].update(judge=[])),
        (SEARCH, lambda d: d.update(rho="x")),
        (SEARCH, lambda d: d.update(prompts=None)),
        (ROBUSTNESS, lambda d: d["training"].update(learning_rate="x")),
        (ROBUSTNESS, lambda d: d["curves"][0].update(attack=5)),
        (ROBUSTNESS, lambda d: d["curves"][0]["points"][0].update(step="1")),
        (ROBUSTNESS, lambda d: d["curves"][0]["points"][0].update(r_ft_over_r_align=float("inf"))),
    ],
)
def test_other_values_that_cannot_be(document: dict[str, Any], change: Change, tmp_path: Path) -> None:
    spoilt = copy.deepcopy(document)
    change(spoilt)
    with pytest.raises(RequestError, match=r"r\.json is damaged, or of another version"):
        shown(spoilt, tmp_path)


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
