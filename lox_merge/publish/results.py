"""What was measured, read from the JSON that `lox-merge asr`, `search` and `robustness` write. Nothing else may be claimed.

A result counts only if it is of this very output: by the hash of its manifest where the result records one, else by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lox_merge.checkpoint.json_text import parse_json
from lox_merge.errors import LoxMergeWarning, RequestError
from lox_merge.publish.documents.attack_success import AttackSuccess
from lox_merge.publish.documents.robustness import HARDENED, Robustness, Training
from lox_merge.publish.documents.search import Search
from lox_merge.publish.documents.shape import AttackRate, PairedChange, Prompts, read_as
from lox_merge.publish.report.runs import printable

ROLES = ("base", "aligned", "hardened")


@dataclass(frozen=True)
class AsrRow:
    """One model asked one set of prompts, decided by one judge. role: of ROLES."""

    role: str
    judge: str
    smoke_test: bool
    prompts: Prompts
    figures: AttackRate


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
    """One model after some steps of a fine-tuning attack; one rate and one R_ft/R_align a seed. run: number of the result file."""

    run: int
    attack: str
    model: str
    step: int
    judge: str
    smoke_test: bool
    prompts: Prompts
    figures: tuple[AttackRate, ...]
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
    training: list[Training] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(row.role == "hardened" for row in self.asr) or bool(self.attacks)

    @property
    def compared(self) -> list[list[AttackPoint]]:
        """The attacks' points by result file, attack and judge. Only those of one list were measured alike, up to the same last step."""
        found: dict[tuple[int, str, str], list[AttackPoint]] = {}
        for point in self.attacks:
            found.setdefault((point.run, point.attack, point.judge), []).append(point)
        return list(found.values())

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

    def roles(self, identity: Mapping[str, Any] | None, title: str = "") -> tuple[str, ...]:
        """Which of ROLES a result's model can be: none for another model, two where base and aligned were folders of one name."""
        identity = identity or {}
        recorded = identity.get("manifest_sha256")
        if recorded is not None and recorded == self.manifest_sha256:
            return ("hardened",)
        # A source may be an output of this program too, with a manifest of its own.
        same = [role for role, source in self.sources.items() if all(identity.get(key) == source.get(key) for key in ("kind", "name", "commit"))]
        if not same and recorded is None and (identity.get("name") or title) in self.names:
            return ("hardened",)
        return tuple(same)


def read_results(files: Sequence[Path], subject: Subject) -> Measured:
    """Raises RequestError for a file that is no result, or says nothing about this output. The same result twice counts once."""
    found = Measured()
    seen: list[dict[str, Any]] = []
    for file in files:
        document = _read(file)
        if document in seen:
            continue
        seen.append(document)
        command = document.get("command")
        reader = _READERS.get(command) if isinstance(command, str) else None
        if reader is None:
            raise RequestError(f'--results {file.name} is no result of lox-merge asr, search or robustness (its "command" is {command!r}).')
        try:
            reader(document, subject, found, f"--results {file.name}")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise RequestError(f"--results {file.name} is damaged, or of another version: {type(error).__name__}: {error}.") from error
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        document = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is no JSON ({error})"
        raise RequestError(f"--results {file.name} cannot be read: {reason}. Give the file that --json wrote.") from error
    if not isinstance(document, dict):
        raise RequestError(f"--results {file.name} holds no JSON object. Give the file that --json wrote.")
    return dict(printable(document))


def _asr(document: Mapping[str, Any], subject: Subject, found: Measured, file: str) -> None:
    result = read_as(AttackSuccess, document, file)
    titles: dict[str, str] = {}
    for evaluation in result.evaluations:
        model = evaluation.model
        # A served model has a name only.
        roles = subject.roles(model.get("source"), model.get("model") or evaluation.title)
        if len(roles) > 1:
            warnings.warn(
                f"{file}: {evaluation.title} may be base or aligned, which were folders of one name, so the card leaves its figures out. "
                "To have them in, harden and measure again from folders of different names.",
                LoxMergeWarning,
                stacklevel=2,
            )
        if len(roles) != 1:
            continue
        titles[evaluation.title] = role = roles[0]
        for judge, figures in evaluation.attack_success.items():
            found.asr.append(AsrRow(role, judge, _smoke(evaluation.judges.get(judge, {})), evaluation.prompts, figures))
        found.utility += [UtilityRow(role, measure, value) for measure, value in evaluation.utility.items()]
    if "hardened" not in titles.values():
        others = ", ".join(evaluation.title for evaluation in result.evaluations)
        raise RequestError(f"{file} holds no evaluation of this output, only of {others}. Evaluate it: lox-merge asr ALIGNED OUT --json.")
    for one in result.comparisons:
        first, second = titles.get(one.first), titles.get(one.second)
        if {first, second} == {"aligned", "hardened"}:
            found.paired.append(_paired(one, turned=first == "hardened"))


def _paired(one: PairedChange, *, turned: bool) -> Paired:
    """The comparison as hardened minus aligned. turned: it was measured the other way round."""
    difference, interval = one.difference, one.interval
    if turned:
        difference = None if difference is None else 0.0 - difference  # not -0.0
        interval = None if interval is None else (-interval[1], -interval[0])
    return Paired(one.judge, one.n, difference, interval, one.p_value)


def _search(document: Mapping[str, Any], subject: Subject, found: Measured, file: str) -> None:
    result = read_as(Search, document, file)
    if "aligned" not in subject.roles(result.model.get("source")):
        raise RequestError(f"{file} is a search on another aligned model than the one this output was made from.")
    judge = judge_name(result.judge)
    found.asr.append(AsrRow("aligned", judge, _smoke(result.judge), result.prompts, result.aligned))
    found.search.append(
        {
            "rank": result.effective_rank,
            "rho": result.rho,
            "judge": judge,
            "prompts": result.prompts,
            "tried": [point.rank for point in result.curve],
            "used": str(subject.recipe["rank"]) == str(result.effective_rank),
        }
    )


def _robustness(document: Mapping[str, Any], subject: Subject, found: Measured, file: str) -> None:
    result = read_as(Robustness, document, file)
    same_pair = all(role in subject.roles(result.sources.get(role)) for role in ("base", "aligned"))
    given, recipe = result.sources.get("hardened"), document["recipe"]
    same_recipe = all(recipe[key] == subject.recipe.get(key) for key in recipe if key not in ("seed", "tolerance"))
    if not same_pair or ("hardened" not in subject.roles(given, given.get("title", "")) if given else not same_recipe):
        raise RequestError(f"{file} compares other models, or another recipe, than this output's. Run lox-merge robustness BASE ALIGNED OUT --json.")
    if HARDENED not in result.models:
        raise RequestError(f"{file} holds no curve of the hardened model ({HARDENED!r}), only of {', '.join(result.models)}.")
    run = len(found.training)
    found.training.append(result.training)
    seeds: dict[tuple[str, str, int, str], list[tuple[AttackRate, float | None]]] = {}
    for curve in result.curves:
        for point in curve.points:
            for judge in result.judges:
                key = (curve.attack, curve.model, point.step, judge)
                seeds.setdefault(key, []).append((point.attack_success[judge], point.r_ft_over_r_align))
    for (attack, model, step, judge), over in seeds.items():
        smoke, rates, ratios = _smoke(result.judges[judge]), tuple(rate for rate, _ in over), tuple(ratio for _, ratio in over)
        found.attacks.append(AttackPoint(run, attack, model, step, judge, smoke, result.prompts, rates, ratios))
    for role, model in (("aligned", "aligned"), ("hardened", HARDENED)):
        first = next((point for curve in result.curves if curve.model == model for point in curve.points if point.step == 0), None)
        found.utility += [UtilityRow(role, measure, value) for measure, value in (first.utility if first else {}).items()]


_READERS: dict[str, Callable[[Mapping[str, Any], Subject, Measured, str], None]] = {"asr": _asr, "search": _search, "robustness": _robustness}


def judge_name(identity: Mapping[str, Any]) -> str:
    """A judge's name from its identity, for results that record the latter only."""
    kind = str(identity["kind"])
    detail = identity.get("model") or identity.get("function") or identity.get("scorer") or ""
    if isinstance(detail, Mapping):
        detail = f"{detail['name']}#{identity.get('label')}"
    return detail if detail.startswith(f"{kind}:") else f"{kind}:{detail}" if detail else kind


def _smoke(identity: Mapping[str, Any]) -> bool:
    return identity.get("kind") == "keyword"
