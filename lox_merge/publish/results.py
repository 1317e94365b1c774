"""What was measured, read from the JSON that `lox-merge asr`, `search` and `robustness` write. Nothing else may be claimed.

A result counts only if it is of this very output: by the hash of its manifest where the result records one, else by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lox_merge.checkpoint.json_text import parse_json
from lox_merge.errors import RequestError
from lox_merge.publish.checked import count, interval, number, optional, prompts, text

ROLES = ("base", "aligned", "hardened")
HARDENED = "LoX"  # how robustness calls the hardened model


@dataclass(frozen=True)
class Rate:
    """An attack success rate. rate, interval (Wilson 95 %): fractions, None where nothing was judged."""

    n: int
    judged: int
    undecided: int
    rate: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class AsrRow:
    """One model asked one set of prompts, decided by one judge. role: of ROLES."""

    role: str
    judge: str
    smoke_test: bool
    prompts: Mapping[str, Any]
    figures: Rate


@dataclass(frozen=True)
class Paired:
    """The hardened model against aligned on the same prompts: difference of the rates, Tango's 95 % interval, exact McNemar p."""

    judge: str
    n: int
    difference: float | None
    interval: tuple[float, float] | None
    p_value: float | None


@dataclass(frozen=True)
class AttackPoint:
    """One model after some steps of a fine-tuning attack; one Rate and one R_ft/R_align a seed."""

    attack: str
    model: str
    step: int
    judge: str
    smoke_test: bool
    prompts: Mapping[str, Any]
    figures: tuple[Rate, ...]
    dispersion: tuple[float | None, ...]


@dataclass(frozen=True)
class UtilityRow:
    """A utility of a model before any attack. The result file records no n for it."""

    role: str
    measure: str
    value: float | None


@dataclass
class Measured:
    """Everything that the result files say about one output."""

    asr: list[AsrRow] = field(default_factory=list)
    paired: list[Paired] = field(default_factory=list)
    attacks: list[AttackPoint] = field(default_factory=list)
    utility: list[UtilityRow] = field(default_factory=list)
    search: list[dict[str, Any]] = field(default_factory=list)
    training: list[Mapping[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(row.role == "hardened" for row in self.asr) or bool(self.attacks)

    @property
    def controls(self) -> list[str]:
        return [model for model in dict.fromkeys(point.model for point in self.attacks) if model not in ("aligned", HARDENED)]

    @property
    def smoke_tests_only(self) -> bool:
        smoke = [row.smoke_test for row in self.asr] + [point.smoke_test for point in self.attacks]
        return bool(smoke) and all(smoke)


@dataclass(frozen=True)
class Subject:
    """What results are compared with. names: of the output (its folder, its repository). sources: as in the manifest."""

    names: tuple[str, ...]
    manifest_sha256: str
    recipe: Mapping[str, Any]
    sources: Mapping[str, Mapping[str, Any]]

    def role(self, identity: Mapping[str, Any] | None, title: str = "") -> str | None:
        """Which of ROLES a result's model is; None for another model."""
        identity = identity or {}
        recorded = identity.get("manifest_sha256")
        if recorded is not None:
            return "hardened" if recorded == self.manifest_sha256 else None
        for role, source in self.sources.items():
            if all(identity.get(key) == source.get(key) for key in ("kind", "name", "commit")):
                return role
        if (identity.get("name") or title) in self.names:
            return "hardened"
        return None


def read_results(files: Sequence[Path], subject: Subject) -> Measured:
    """Raises RequestError for a file that is no result, or says nothing about this output."""
    found = Measured()
    for file in files:
        document = _read(file)
        reader = {"asr": _asr, "search": _search, "robustness": _robustness}.get(str(document.get("command")))
        if reader is None:
            raise RequestError(
                f'--results {file.name} is no result of lox-merge asr, search or robustness (its "command" is {document.get("command")!r}).'
            )
        try:
            reader(document, subject, found, file.name)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError) as error:
            raise RequestError(f"--results {file.name} is damaged, or of another version: {type(error).__name__}: {error}.") from error
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        document = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise RequestError(f"--results {file.name} cannot be read: {reason}. Give the file that --json wrote.") from error
    if not isinstance(document, dict):
        raise RequestError(f"--results {file.name} holds no JSON object. Give the file that --json wrote.")
    return document


def _asr(document: Mapping[str, Any], subject: Subject, found: Measured, file: str) -> None:
    titles: dict[str, str] = {}
    for evaluation in document["evaluations"]:
        model = evaluation["model"]
        # A served model has a name only.
        role = subject.role(model.get("source"), model.get("model") or evaluation["title"])
        if role is None:
            continue
        titles[evaluation["title"]] = role
        for judge, figures in evaluation["attack_success"].items():
            found.asr.append(AsrRow(role, judge, _smoke(evaluation["judges"][judge]), prompts(evaluation["prompts"]), _rate(figures)))
        found.utility += _utility(role, evaluation.get("utility", {}))
    if "hardened" not in titles.values():
        others = ", ".join(str(evaluation["title"]) for evaluation in document["evaluations"])
        raise RequestError(f"--results {file} holds no evaluation of this output, only of {others}. Evaluate it: lox-merge asr ALIGNED OUT --json.")
    for one in document["comparisons"]:
        if (titles.get(one["first"]), titles.get(one["second"])) == ("aligned", "hardened"):
            figures = optional(one["difference"], "difference", -1, 1), interval(one["interval"], -1, 1), optional(one["p_value"], "p_value", 0, 1)
            found.paired.append(Paired(text(one["judge"], "judge"), count(one["n"], "n"), *figures))


def _search(document: Mapping[str, Any], subject: Subject, found: Measured, file: str) -> None:
    if subject.role(document["model"].get("source")) != "aligned":
        raise RequestError(f"--results {file} is a search on another aligned model than the one this output was made from.")
    judge = judge_name(document["judge"])
    found.asr.append(AsrRow("aligned", judge, _smoke(document["judge"]), prompts(document["prompts"]), _rate(document["aligned"])))
    used = str(subject.recipe["rank"])
    found.search.append(
        {
            "rank": document["effective_rank"],
            "rho": number(document["rho"], "rho"),
            "confident": document["confident"],
            "judge": judge,
            "prompts": document["prompts"],
            "tried": [point["rank"] for point in document["curve"]],
            "used": used == str(document["effective_rank"]),
        }
    )


def _robustness(document: Mapping[str, Any], subject: Subject, found: Measured, file: str) -> None:
    sources = document["sources"]
    same_pair = all(subject.role(sources[role]) == role for role in ("base", "aligned"))
    given = sources["hardened"]
    same_recipe = all(document["recipe"][key] == subject.recipe[key] for key in document["recipe"] if key not in ("seed", "tolerance"))
    if not same_pair or (subject.role(given, given.get("title", "")) != "hardened" if given else not same_recipe):
        raise RequestError(
            f"--results {file} compares other models, or another recipe, than this output's. Run lox-merge robustness BASE ALIGNED OUT --json."
        )
    found.training.append(document["training"] | {"learning_rate": number(document["training"]["learning_rate"], "learning_rate")})
    curves = document["curves"]
    seeds: dict[tuple[str, str, int, str], list[tuple[Rate, float | None]]] = {}
    for curve in curves:
        for point in curve["points"]:
            for judge, figures in point["attack_success"].items():
                key = (text(curve["attack"], "attack"), text(curve["model"], "model"), count(point["step"], "step"), judge)
                seeds.setdefault(key, []).append((_rate(figures), optional(point["r_ft_over_r_align"], "r_ft_over_r_align")))
    for (attack, model, step, judge), over in seeds.items():
        smoke, rates, ratios = _smoke(document["judges"][judge]), tuple(rate for rate, _ in over), tuple(ratio for _, ratio in over)
        found.attacks.append(AttackPoint(attack, model, step, judge, smoke, prompts(document["prompts"]), rates, ratios))
    for role, model in (("aligned", "aligned"), ("hardened", HARDENED)):
        first = next((point for curve in curves if curve["model"] == model for point in curve["points"] if point["step"] == 0), None)
        found.utility += _utility(role, (first or {"utility": {}})["utility"])


def judge_name(identity: Mapping[str, Any]) -> str:
    """A judge's name from its identity, for results that record the latter only."""
    kind = str(identity["kind"])
    detail = identity.get("model") or identity.get("function") or identity.get("scorer") or ""
    if isinstance(detail, Mapping):
        detail = f"{detail['name']}#{identity.get('label')}"
    return detail if detail.startswith(f"{kind}:") else f"{kind}:{detail}" if detail else kind


def _smoke(identity: Mapping[str, Any]) -> bool:
    return identity.get("kind") == "keyword"


def _rate(figures: Mapping[str, Any]) -> Rate:
    n, judged, undecided = (count(figures[name], name) for name in ("n", "judged", "undecided"))
    return Rate(n, judged, undecided, optional(figures["rate"], "rate", 0, 1), interval(figures["interval"], 0, 1))


def _utility(role: str, values: Mapping[str, Any]) -> list[UtilityRow]:
    return [UtilityRow(role, measure, optional(value, measure)) for measure, value in values.items()]
