"""Whose results these are: the card gives figures to the right model, or to none."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from adapters import make_adapter
from card_documents import RECIPE, Replies, asr, card_of, evaluation, replies, robustness

from lox_merge import harden
from lox_merge.errors import LoxMergeWarning, RequestError
from lox_merge.jobs.adapter import execute_adapter
from lox_merge.jobs.adapter_plan import plan_adapter
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.manifest import output_identity
from lox_merge.publish.output import open_output
from lox_merge.safety.adapted import open_any
from lox_merge.safety.asr import compare, judge_replies
from lox_merge.safety.judges.keyword import KeywordJudge
from lox_merge.safety.prompts import prompt_set
from lox_merge.safety.types import Prompt

HERE = r"\| \*\*this model\*\* \(after\) \| [^|]*\| [^|]*\| 12\.5 % \|"


def own(out: Path) -> dict[str, str]:
    return {"manifest_sha256": open_output(out).manifest_sha256}


def test_an_aligned_model_that_is_an_output_itself(card_out: Path, tmp_path: Path) -> None:
    manifest = {"manifest_sha256": "c" * 64}  # of the hardening, or filtering, that made it
    card = card_of(card_out, asr(tmp_path / "x.json", evaluation("aligned", manifest, 0.5), evaluation("hardened", own(card_out), 0.125)))
    assert "| aligned (before) | keyword (smoke test) | requests.txt | 50.0 % |" in card.content and re.search(HERE, card.content)
    assert "Against aligned on the same 8 prompts" in card.content
    file = robustness(tmp_path / "r.json", {"kind": "folder", "name": "hardened", **own(card_out)}, {"aligned": [2], "LoX": [6]})
    document = json.loads(file.read_text())
    document["sources"]["aligned"] |= manifest
    file.write_text(json.dumps(document))
    assert "| benign | **this model** | 50 |" in card_of(card_out, file).content
    # A manifest that is neither this output's nor in a folder of a source's name: another model, whatever its name.
    with pytest.raises(RequestError, match="holds no evaluation of this output"):
        card_of(card_out, asr(tmp_path / "x.json", evaluation("aligned", {}), evaluation("hardened", manifest)))


def test_an_adapter_is_told_by_its_own_manifest(card_pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, aligned, out = card_pair
    for alpha in (1.25, 5.0):
        recipe = replace(RECIPE, alpha=alpha, rounding="nearest")
        execute_adapter(plan_adapter(plan_hardening(base, aligned, tmp_path / str(alpha) / "hardened", recipe=recipe)), device="cpu")
    one, other = (tmp_path / name / "hardened" for name in ("1.25", "5.0"))
    shown = evaluation("hardened", output_identity(open_any(one, "model", adapter_base=aligned)), 0.125)
    assert re.search(HERE, card_of(one, asr(tmp_path / "x.json", evaluation("aligned", {}), shown)).content)
    with pytest.raises(RequestError, match="holds no evaluation of this output"):
        card_of(other, asr(tmp_path / "x.json", evaluation("aligned", {}), shown))
    # Somebody's adapter over an output is not that output.
    over = make_adapter(out, tmp_path / "over", chat=False, r=2)
    assert output_identity(open_any(over, "model", adapter_base=out, base_is_right=True)) == {}
    assert output_identity(open_any(out, "model")) == own(out)


def test_base_and_aligned_in_folders_of_one_name(card_pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pair = [shutil.copytree(card_pair[role], tmp_path / place / "model") for role, place in ((0, "before"), (1, "after"))]
    harden(*pair, tmp_path / "hardened", recipe=RECIPE)
    out = tmp_path / "hardened"
    file = asr(tmp_path / "x.json", evaluation("model", {}, 0.5), evaluation("hardened", own(out), 0.125))
    with pytest.warns(LoxMergeWarning, match=r"x\.json: model may be base or aligned, which were folders of one name"):
        card = card_of(out, file)
    assert re.search(HERE, card.content)
    for words in ("pre-trained) |", "aligned (before) |", "Against aligned"):
        assert words not in card.content
    # robustness says itself which of them is which.
    names = {role: {"kind": "folder", "name": "model"} for role in ("base", "aligned")}
    document = json.loads(robustness(tmp_path / "r.json", None, {"aligned": [2], "LoX": [6]}).read_text())
    (tmp_path / "r.json").write_text(json.dumps({**document, "sources": {**names, "hardened": None}}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoxMergeWarning)
        assert "| benign | aligned | 50 | keyword (smoke test) | 75.0 % |" in card_of(out, tmp_path / "r.json").content


def test_the_comparison_counts_in_either_order(card_out: Path, tmp_path: Path) -> None:
    prompts, judge = prompt_set([Prompt(str(i), f"request {i}") for i in range(8)], "requests.txt"), KeywordJudge()
    models = {name: judge_replies(Replies({}, name), prompts, replies(refused), [judge]) for name, refused in (("aligned", 3), ("hardened", 6))}
    lines = []
    for first, second in (("aligned", "hardened"), ("hardened", "aligned")):
        found = compare(models[first], models[second], "keyword")
        measured = [evaluation(name, own(card_out) if name == "hardened" else {}) for name in (first, second)]
        figures = {name: getattr(found, name) for name in ("difference", "interval", "p_value")}
        card = card_of(card_out, asr(tmp_path / "x.json", *measured, **figures))
        lines += [line for line in card.content.splitlines() if line.startswith("Against aligned")]
    assert len(lines) == 2 and lines[0] == lines[1] and ": -37.5 percentage points" in lines[0]
    equal = asr(tmp_path / "x.json", evaluation("hardened", own(card_out)), evaluation("aligned", {}), difference=0.0)
    assert ": +0.0 percentage points" in card_of(card_out, equal).content


def test_the_same_result_twice_counts_once(card_out: Path, tmp_path: Path) -> None:
    attack = robustness(tmp_path / "r.json", None, {"aligned": [2], "LoX": [6]})
    rates = asr(tmp_path / "x.json", evaluation("aligned", {}), evaluation("hardened", own(card_out)))
    copies = [shutil.copy(file, tmp_path / f"copy_{file.name}") for file in (attack, rates)]
    once, twice = card_of(card_out, attack, rates), card_of(card_out, attack, rates, *map(Path, copies))
    assert twice.content == once.content and twice.picture == once.picture


FOREIGN = "k\n\n# Certified safe\n\n<img src=x onerror=alert(1)> [here](https://x.org) **`sure`** | and"


def test_foreign_names_are_no_text_of_the_card(card_out: Path, tmp_path: Path) -> None:
    rates = asr(tmp_path / "x.json", evaluation("aligned", {}, judge=FOREIGN), evaluation("hardened", own(card_out), judge=FOREIGN), judge=FOREIGN)
    undecided = asr(
        tmp_path / "y.json", evaluation("aligned", {}), evaluation("hardened", own(card_out)), judge=FOREIGN, difference=None, interval=None
    )
    attacks = [robustness(tmp_path / f"{last}.json", None, {"aligned": [2], "LoX": [6], "gaussian": [1]}, last=last) for last in (50, 60)]
    document = json.loads(attacks[0].read_text())
    text = json.dumps({**document, "prompts": {**document["prompts"], "source": FOREIGN}})
    for old, new in (("keyword", FOREIGN), ("benign", FOREIGN), ("gaussian", FOREIGN), ("perplexity", FOREIGN)):
        text = text.replace(json.dumps(old), json.dumps(new))
    attacks[0].write_text(text)
    attacks.append(robustness(tmp_path / "c.json", None, {"aligned": [2], "LoX": [6]}, attack=FOREIGN))  # no controls
    card = card_of(card_out, rates, undecided, *attacks)
    body = card.content.split("\n---\n", 1)[1]
    assert body.count("Certified safe") > 10 and "# Certified safe" not in [line.strip() for line in body.splitlines()]
    assert "<img" not in body and "[here](" not in body and "**`sure`**" not in body
    assert r"judged by k # Certified safe &lt;img src=x onerror=alert(1)> \[here\](https://x.org) \*\*\`sure\`\*\* | and:" in body
    rows = [line for line in body.splitlines() if line.startswith("| k # Certified safe")]
    assert {line.count("|") - line.count("\\|") for line in rows} == {4, 9}  # of the tables of utility and of attacks
