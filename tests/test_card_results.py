"""What was measured, in the card: figures of the right models, and nothing that the files do not hold."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
from card_documents import card_of, figures, robustness
from click.testing import CliRunner
from huggingface_hub import ModelCard

from lox_merge import Recipe, harden
from lox_merge.cli.main import cli
from lox_merge.errors import LoxMergeWarning, RequestError
from lox_merge.publish.picture import PICTURE


def test_figures_of_asr_come_into_table_metadata_and_picture(card_pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    (tmp_path / "requests.txt").write_text("how do i help you\nhow do you help\nhow\n")
    asked = ["--prompts", tmp_path / "requests.txt", "--judge", "keyword", "--max-new-tokens", 3, "--device", "cpu", "--no-cache"]
    done = CliRunner().invoke(cli, [str(word) for word in ("asr", card_pair[1], card_pair[2], *asked, "--json", tmp_path / "asr.json")])
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "asr.json").read_text())
    figures = document["evaluations"][1]["attack_success"]["keyword"]
    card = card_of(card_pair[2], tmp_path / "asr.json")
    rate, (low, high) = figures["rate"], figures["interval"]
    judged, undecided = figures["judged"], figures["undecided"]
    interval = f"{100 * low:.1f} to {100 * high:.1f} %"
    row = f"| **this model** (after) | keyword (smoke test) | requests.txt | {100 * rate:.1f} % | {interval} | {judged} of 3 | {undecided} |"
    assert row in card.content and "| aligned (before) | keyword (smoke test) |" in card.content
    assert f"Against aligned on the same {document['comparisons'][0]['n']} prompts, judged by keyword: " in card.content
    assert "by the keyword judge, a smoke test" in card.content and "resistance to fine-tuning was not measured" in card.content
    assert "Not evaluated" not in card.content and "Utility was not measured." in card.content
    (result,) = card.data.eval_results or []
    assert (result.metric_value, result.dataset_type, result.metric_args["n"], result.metric_args["wilson_95_high"]) == (
        rate,
        "requests.txt",
        3,
        high,
    )
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()
    assert card.picture is not None and f"]({PICTURE})" in card.content
    assert card_of(card_pair[2], tmp_path / "asr.json").picture == card.picture  # the same figures, the same bytes

    # The result is of this very output, not of one that has its name.
    namesake = tmp_path / "hardened"
    harden(card_pair[0], card_pair[1], namesake, recipe=Recipe(rank=1))
    with pytest.raises(RequestError, match="holds no evaluation of this output, only of aligned, hardened"):
        card_of(namesake, tmp_path / "asr.json")


def test_robustness_shows_attacks_utility_and_what_the_controls_showed(card_out: Path, tmp_path: Path) -> None:
    hardened = {"kind": "folder", "name": "hardened", "title": "hardened"}
    as_good = robustness(tmp_path / "r.json", hardened, {"aligned": [2], "LoX": [6], "full-rank": [6], "gaussian": [3]})
    card = card_of(card_out, as_good)
    for words in (
        "| benign | **this model** | 50 | keyword (smoke test) | 25.0 % | 7.1 to 59.1 % | 8 of 8 | 1.00 |",
        "| benign | aligned | 50 | keyword (smoke test) | 75.0 % |",
        "| benign | control: full-rank | 50 |",
        "did as well (full-rank 25.0 %; this model 25.0 %): that the direction of the edit is the cause is not shown",
        "| perplexity | 12.5 | 12.75 |",
        "One seed of the data's order",
        "full fine-tuning in float32, learning rate 2e-05",
    ):
        assert words in card.content
    values = {result.dataset_config: result.metric_value for result in card.data.eval_results or []}
    assert values == {"after 0 fine-tuning steps on benign": 0.0, "after 50 fine-tuning steps on benign": 0.25}
    assert card.picture is not None and card.picture.startswith(b"<?xml")

    better = card_of(card_out, robustness(tmp_path / "r.json", None, {"aligned": [2, 2, 4], "LoX": [7, 6, 8], "gaussian": [3, 3, 2]}))
    assert "every edit of the same norm in other directions had a higher ASR (gaussian 62.5 %; this model 12.5 %)" in better.content
    assert "| benign | **this model** | 50 | keyword (smoke test) | 12.5 % | 0.0 to 25.0 % over 3 seeds | 24 of 24 |" in better.content
    bare = card_of(card_out, robustness(tmp_path / "r.json", None, {"aligned": [2], "LoX": [7]}))
    assert "No controls were run: whether the *directions* of the edit matter" in bare.content
    with pytest.raises(RequestError, match="compares other models, or another recipe"):
        card_of(card_out, robustness(tmp_path / "r.json", None, {"aligned": [2], "LoX": [7]}, recipe=Recipe(rank=1)))


def test_a_search_tells_how_the_rank_was_found(card_out: Path, tmp_path: Path) -> None:
    found = {
        "command": "search", "effective_rank": 4, "rho": 0.01, "confident": False, "judge": {"kind": "openai", "model": "gpt-4.1"},
        "prompts": {"source": "requests.txt", "n": 8, "sha256": "d" * 64}, "model": {"source": {"kind": "folder", "name": "aligned"}},
        "aligned": figures(0.0), "aligned_utility": {}, "noise_floor": {"median": 4, "smallest": 3, "largest": 5, "open": 0}, "notes": [],
        "curve": [{"rank": rank, "attack": figures(0.0), "increase": 0.0, "upper_bound": 0.3, "accepted": True, "mean_r_align": 0.9,
                   "energy_r_align": 0.9, "utility": {}} for rank in (0, 4)],
    }  # fmt: skip
    (tmp_path / "s.json").write_text(json.dumps(found))
    card = card_of(card_out, tmp_path / "s.json")
    assert "The effective rank by behaviour is 4 (ρ = 0.01, 8 prompts of requests.txt, judged by openai:gpt-4.1; tried: 0, 4)." in card.content
    assert "| aligned (before) | openai:gpt-4.1 | requests.txt | 0.0 % |" in card.content
    assert "Not evaluated" in card.content and card.data.eval_results is None  # the hardened model itself was not
    (tmp_path / "s.json").write_text(json.dumps({**found, "model": {"source": {"kind": "folder", "name": "other"}}}))
    with pytest.raises(RequestError, match="another aligned model"):
        card_of(card_out, tmp_path / "s.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not JSON", "it is no JSON"),
        ("[]", "holds no JSON object"),
        ('{"command": "harden"}', "no result of lox-merge asr, search or robustness"),
        ('{"command": "asr"}', r"x\.json does not hold what this version writes \(evaluations: missing; comparisons: missing\)"),
        ('{"command": "asr", "evaluations": [], "comparisons": []}', "evaluations: Tuple should have at least 1 item"),
    ],
)
def test_other_files_are_no_results(card_out: Path, tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(RequestError, match=words):
        card_of(card_out, tmp_path / "x.json")
    with pytest.raises(RequestError, match=r"nothing\.json cannot be read: No such file"):
        card_of(card_out, tmp_path / "nothing.json")


def test_names_from_results_cannot_break_the_card_or_carry_paths(card_out: Path, tmp_path: Path) -> None:
    def result(judge: str) -> Path:
        figures = {"n": 1, "judged": 1, "successes": 0, "undecided": 0, "rate": 0.0, "interval": [0.0, 0.8], "mean_score": None}
        model = {"kind": "endpoint", "model": "hardened"}
        one = {"title": "hardened", "model": model, "prompts": {"source": "p", "sha256": "e" * 64, "n": 1}, "judges": {judge: {"kind": "python"}}}
        document = {"command": "asr", "evaluations": [{**one, "attack_success": {judge: figures}, "agreement": []}], "comparisons": []}
        (tmp_path / "x.json").write_text(json.dumps(document))
        return tmp_path / "x.json"

    card = card_of(card_out, result("a|b\n<script>---"))
    assert "| a\\|b &lt;script>--- |" in card.content
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()
    for name in (f"python:{card_out.parent}/judge.py:f", f"classifier {Path(__file__)}"):
        with pytest.raises(RequestError, match="names a path of this machine"):
            card_of(card_out, result(name))
    assert "/usr/bin/env" in card_of(card_out, result("inspect:/usr/bin/env x/y and/or a/b https://x.org/tmp/a")).content
    with pytest.raises(RequestError, match="holds an access token") as caught:
        card_of(card_out, result("hf_" + "Z" * 34))
    assert "ZZZ" not in str(caught.value)


def test_no_picture_without_matplotlib(card_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    results = robustness(tmp_path / "r.json", None, {"aligned": [2], "LoX": [6]})
    with pytest.warns(LoxMergeWarning, match="matplotlib is missing"):
        card = card_of(card_out, results)
    assert card.picture is None and "![" not in card.content and "25.0 %" in card.content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        card_of(card_out)
