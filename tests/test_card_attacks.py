"""Attacks and their controls in the card: each compared by itself, whatever other result files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from card_documents import card_of, robustness

from lox_merge.errors import RequestError
from lox_merge.publish.card import Card

CONTROLLED = {"aligned": [0], "LoX": [6], "full-rank": [4], "gaussian": [1]}
BARE = {"aligned": [0], "LoX": [6]}


def limits(card: Card) -> list[str]:
    return [line for line in card.content.split("## Limits")[1].split("## Check it")[0].splitlines() if "directions" in line or "controls" in line]


def test_controls_of_one_attack_say_nothing_about_another(card_out: Path, tmp_path: Path) -> None:
    first = robustness(tmp_path / "a.json", None, CONTROLLED)
    second = robustness(tmp_path / "b.json", None, BARE, attack="harmful")
    assert limits(card_of(card_out, first, second)) == [
        "- After 50 steps on benign (judged by keyword), every edit of the same norm in other directions had a higher ASR "
        "(full-rank 50.0 %, gaussian 87.5 %; this model 25.0 %); mind the intervals.",
        "- No controls were run on harmful (judged by keyword): whether the *directions* of the edit matter, rather than its size, "
        "is not shown there.",
    ]
    none = limits(card_of(card_out, robustness(tmp_path / "a.json", None, BARE), second))
    assert none == ["- No controls were run: whether the *directions* of the edit matter, rather than its size, is not shown."]


def test_figures_of_two_files_are_not_compared_with_each_other(card_out: Path, tmp_path: Path) -> None:
    first = robustness(tmp_path / "a.json", None, CONTROLLED)
    again = robustness(tmp_path / "b.json", None, {"aligned": [0], "LoX": [2]})  # the same attack, with another outcome and no controls
    (line,) = limits(card_of(card_out, first, again))
    assert "had a higher ASR (full-rank 50.0 %, gaussian 87.5 %; this model 25.0 %)" in line


def test_each_attack_has_its_own_last_step(card_out: Path, tmp_path: Path) -> None:
    long = robustness(tmp_path / "a.json", None, {"aligned": [0], "LoX": [6], "gaussian": [4]}, last=100)
    short = robustness(tmp_path / "b.json", None, {"aligned": [0], "LoX": [4], "gaussian": [7]}, attack="harmful", last=20)
    card = card_of(card_out, long, short)
    assert [line.split(" (")[0] for line in limits(card)] == ["- After 100 steps on benign", "- After 20 steps on harmful"]
    assert "did as well (gaussian 12.5 %; this model 50.0 %)" in limits(card)[1]
    values = {result.dataset_config: result.metric_value for result in card.data.eval_results or []}
    assert values == {
        "after 0 fine-tuning steps on benign": 0.0,
        "after 100 fine-tuning steps on benign": 0.25,
        "after 0 fine-tuning steps on harmful": 0.0,
        "after 20 fine-tuning steps on harmful": 0.5,
    }


def test_long_curves_are_shown_by_their_own_ends(card_out: Path, tmp_path: Path) -> None:
    def longer(file: Path) -> Path:
        """Twelve points between the first and the last."""
        document = json.loads(file.read_text())
        for curve in document["curves"]:
            first, last = curve["points"]
            curve["points"] = [first, *({**last, "step": step} for step in range(2, 14)), last]
        file.write_text(json.dumps(document))
        return file

    long = longer(robustness(tmp_path / "a.json", None, BARE, last=100))
    short = longer(robustness(tmp_path / "b.json", None, BARE, attack="harmful", last=20))
    rows = [line.split(" | ")[:3] for line in card_of(card_out, long, short).content.splitlines() if line.startswith(("| benign", "| harmful"))]
    assert [(attack, steps) for attack, _, steps in rows] == [
        *[("| benign", "0"), ("| benign", "100")] * 2,
        *[("| harmful", "0"), ("| harmful", "20")] * 2,
    ]


@pytest.mark.parametrize("order", [(1, 3), (3, 1)])
def test_files_with_other_numbers_of_seeds_go_together(card_out: Path, tmp_path: Path, order: tuple[int, int]) -> None:
    files = [robustness(tmp_path / f"{seeds}.json", None, {"aligned": [0] * seeds, "LoX": [6] * seeds}) for seeds in order]
    card = card_of(card_out, *files)
    assert card.picture is not None and card.content.count("| benign | **this model** | 50 |") == 2
    document = json.loads((tmp_path / "3.json").read_text())
    document["curves"] = [curve for curve in document["curves"] if curve["model"] == "LoX" or curve["seed"] == 0]
    (tmp_path / "3.json").write_text(json.dumps(document))
    assert card_of(card_out, *files).picture is not None


@pytest.mark.parametrize("name", ["costs $5", r"a $\frac{ b", "$x^2$"])
def test_dollars_in_a_name_are_no_formula(card_out: Path, tmp_path: Path, name: str) -> None:
    card = card_of(card_out, robustness(tmp_path / "r.json", None, BARE, attack=name))
    assert card.picture is not None and f"<!-- {name}, judged by keyword -->".encode() in card.picture


def test_a_result_without_the_hardened_model_is_refused(card_out: Path, tmp_path: Path) -> None:
    document = json.loads(robustness(tmp_path / "r.json", None, BARE).read_text())
    document["curves"] = [curve for curve in document["curves"] if curve["model"] == "aligned"]
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(RequestError, match=r"r\.json holds no curve of the hardened model \('LoX'\), only of aligned"):
        card_of(card_out, tmp_path / "r.json")
