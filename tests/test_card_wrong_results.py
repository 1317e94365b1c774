"""Result files that are damaged, or not what they seem: one message that names the file and the field, and never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from card_documents import asr, card_of, evaluation, figures, robustness
from conftest import RunCli

from lox_merge.errors import RequestError

Document = dict[str, Any]


def damaged(file: Path, change: Callable[[Document], Any]) -> Path:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    return file


def rates(**others: Any) -> Callable[[Document], None]:
    return lambda document: document["evaluations"][1]["attack_success"]["keyword"].update(others)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (rates(rate="0.25"), r"evaluations\.1\.attack_success\.keyword\.rate"),
        (rates(rate=25), r"evaluations\.1\.attack_success\.keyword\.rate"),
        (rates(rate=-0.1), r"evaluations\.1\.attack_success\.keyword\.rate"),
        (rates(rate=float("nan")), r"evaluations\.1\.attack_success\.keyword\.rate"),
        (rates(interval=[0.1, 9]), r"evaluations\.1\.attack_success\.keyword\.interval\.1"),
        (rates(rate=10**400), r"evaluations\.1\.attack_success\.keyword\.rate"),
        (rates(interval=[0.9, 0.1]), r"keyword\.interval: an interval goes from 0\.9 down to 0\.1"),
        (rates(judged=-1), r"evaluations\.1\.attack_success\.keyword\.judged"),
        (lambda document: document["evaluations"][1].update(utility={"perplexity": "12"}), r"evaluations\.1\.utility\.perplexity"),
        (lambda document: document["evaluations"][1].update(utility=[1]), r"evaluations\.1\.utility"),
        (lambda document: document["evaluations"][1]["prompts"].pop("n"), r"evaluations\.1\.prompts\.n: missing"),
        (lambda document: document["evaluations"][1]["prompts"].pop("sha256"), r"evaluations\.1\.prompts\.sha256: missing"),
        (lambda document: document.update(evaluations=["a"]), r"evaluations\.0"),
        (lambda document: document["comparisons"][0].update(difference="a"), r"comparisons\.0\.difference"),
        (lambda document: document["comparisons"][0].update(p_value="0.5"), r"comparisons\.0\.p_value"),
        (lambda document: document.update(command=["asr"]), r"""is no result of .* \(its "command" is \['asr'\]\)"""),
    ],
)
def test_fields_of_asr(card_out: Path, tmp_path: Path, change: Callable[[Document], Any], field: str) -> None:
    file = asr(tmp_path / "x.json", evaluation("aligned", {}), evaluation("hardened", {}))
    card_of(card_out, file)
    with pytest.raises(RequestError, match=rf"--results x\.json .*{field}"):
        card_of(card_out, damaged(file, change))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda document: document.update(training={}), r"training\.steps: missing; training\.learning_rate: missing"),
        (lambda document: document.update(training="x"), "training: "),
        (lambda document: document.update(prompts="x"), "prompts: "),
        (lambda document: document["curves"][0]["points"][0].update(step="1"), r"curves\.0\.points\.0\.step"),
        (lambda document: document["curves"][0]["points"][0]["attack_success"].update(keyword=figures(2.0)), r"attack_success\.keyword\.rate"),
        (lambda document: document["curves"][0]["points"][0].update(r_ft_over_r_align="1"), r"curves\.0\.points\.0\.r_ft_over_r_align"),
        (lambda document: document.update(sources=5), "sources: "),
        (lambda document: document.update(recipe=None), "recipe: "),
        (lambda document: document.update(curves=[]), "curves: "),
    ],
)
def test_fields_of_robustness(card_out: Path, tmp_path: Path, change: Callable[[Document], Any], field: str) -> None:
    file = robustness(tmp_path / "x.json", None, {"aligned": [2], "LoX": [6]})
    card_of(card_out, file)
    with pytest.raises(RequestError, match=rf"--results x\.json .*{field}"):
        card_of(card_out, damaged(file, change))


@pytest.mark.parametrize("content", [b"[" * 100_000, b'\xff\xfe{"a"', b'{"command": "\\ud800"}', b"9" * 10_000])
def test_what_json_cannot_hold(card_out: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(RequestError, match=r"--results x\.json cannot be read: it is no JSON"):
        card_of(card_out, tmp_path / "x.json")


def test_the_command_says_so_without_a_traceback(card_out: Path, tmp_path: Path, run_cli: RunCli) -> None:
    file = asr(tmp_path / "x.json", evaluation("aligned", {}), evaluation("hardened", {}))
    done = run_cli("card", card_out, "--license", "mit", "--results", damaged(file, rates(rate=float("nan"))), "--json", "-")
    assert done.returncode == 2 and done.stdout == "" and not (card_out / "README.md").exists()
    assert done.stderr.startswith("error: --results x.json ") and done.stderr.count("\n") == 1
