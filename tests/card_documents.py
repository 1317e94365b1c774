"""Results as their commands write them, for tests of the model card, and the card that they give."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lox_merge import Recipe
from lox_merge.publish.card import Card, CardSettings, build_card
from lox_merge.publish.licence import Licence
from lox_merge.publish.output import FinishedOutput, open_output
from lox_merge.safety.asr import judge_replies
from lox_merge.safety.attack import AttackSettings
from lox_merge.safety.conversations import Conversations
from lox_merge.safety.dispersion import Ratio
from lox_merge.safety.judges.keyword import KeywordJudge
from lox_merge.safety.prompts import prompt_set
from lox_merge.safety.robustness import Curve, Point, Robustness
from lox_merge.safety.types import Prompt, PromptSet, Reply

MIT = Licence(("mit",))
RECIPE = Recipe(rank=4, alpha=1.5, exclude=("lm_head",), rank_pattern=(("k_proj", 2),), alpha_pattern=(("v_proj|q_proj", 0.5),), rounding="feedback")
PROMPTS = prompt_set([Prompt(str(i), f"request {i}") for i in range(8)], "requests.txt")


def card_of(out: Path, *results: Path, repo: str | None = "me/hardened", **settings: Any) -> Card:
    return build_card(open_output(out), repo, CardSettings(results=results, **{"licence": MIT, **settings}))


def from_hub(out: Path, **identities: dict[str, Any]) -> FinishedOutput:
    """The output as if its sources had been on the Hub."""
    output = open_output(out)
    sources = {role: {**identity, **identities.get(role, {})} for role, identity in output.manifest["sources"].items()}
    return replace(output, manifest={**output.manifest, "sources": sources})


class Replies:
    """A model whose replies are given."""

    def __init__(self, source: dict[str, Any], title: str) -> None:
        self.source, self.title = source, title

    def identity(self) -> dict[str, Any]:
        return {"kind": "local", "source": self.source}

    def replies(self, prompts: PromptSet) -> list[Reply]:
        raise NotImplementedError


def replies(refused: int, n: int = 8) -> list[Reply]:
    return [Reply(str(i), "I'm sorry, I cannot." if i < refused else "Sure: first you", True) for i in range(n)]


def robustness(
    file: Path,
    hardened: dict[str, Any] | None,
    after: dict[str, Sequence[int]],
    recipe: Recipe = RECIPE,
    *,
    attack: str = "benign",
    last: int = 50,
) -> Path:
    """A result of `lox-merge robustness` by its own classes. after: refusals of 8 left after the last step, by model and seed."""
    judge, ratio = KeywordJudge(), Ratio(0.9, 0.9, 10)
    curves = []
    for model, left in after.items():
        for seed, refused in enumerate(left):
            points = []
            for step, count in ((0, 8), (last, refused)):
                evaluation = judge_replies(Replies({"kind": "folder", "name": "aligned"}, model), PROMPTS, replies(count), [judge])
                points.append(Point(step, evaluation, ratio, {"perplexity": 12.5 if model == "aligned" else 12.75}))
            curves.append(Curve(attack, model, seed, ratio, tuple(points), ()))
    settings = AttackSettings(steps=(0, last))
    sources = {"base": {"kind": "folder", "name": "base"}, "aligned": {"kind": "folder", "name": "aligned"}, "hardened": hardened}
    data = Conversations(attack, f"{attack}.jsonl", (), "c" * 64)
    seeds = tuple(range(len(after["LoX"])))
    result = Robustness(sources, recipe, settings, (data,), seeds, tuple(curves))
    file.write_text(json.dumps({"command": "robustness", **result.to_json()}))
    return file


def figures(rate: float) -> dict[str, Any]:
    """An attack success rate of 8 prompts."""
    return {"n": 8, "judged": 8, "successes": round(8 * rate), "undecided": 0, "rate": rate, "interval": [0.1, 0.9], "mean_score": None}


def evaluation(title: str, source: dict[str, Any], rate: float = 0.25, judge: str = "keyword") -> dict[str, Any]:
    """One model of a result of `lox-merge asr`. source: its identity beside that it is a folder of this name."""
    return {
        "title": title,
        "model": {"kind": "local", "source": {"kind": "folder", "name": title, **source}},
        "prompts": {"source": "requests.txt", "sha256": "d" * 64, "n": 8},
        "judges": {judge: {"kind": judge.partition(":")[0]}},
        "attack_success": {judge: figures(rate)},
        "agreement": [],
        "utility": {},
    }


def asr(file: Path, *evaluations: dict[str, Any], **comparison: Any) -> Path:
    """A result of `lox-merge asr`: the second model against the first. comparison: what else it says, as judge='openai:x'."""
    first, second = evaluations
    compared = {"first": first["title"], "second": second["title"], "judge": "keyword", "n": 8, "only_first": 2, "only_second": 1}
    compared |= {"difference": -0.125, "interval": [-0.5, 0.25], "p_value": 1.0, **comparison}
    file.write_text(json.dumps({"command": "asr", "evaluations": [first, second], "comparisons": [compared]}))
    return file
