"""Attack success rate (ASR): a model asked, its replies judged, models compared on the same prompts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lox_merge.errors import LoxMergeError, RequestError
from lox_merge.safety import statistics
from lox_merge.safety.cache import VerdictCache, cached_verdicts
from lox_merge.safety.reasoning import without_reasoning
from lox_merge.safety.types import AttackSuccess, Evaluation, Exchange, Judge, PromptSet, Reply, ReplySource, Verdict

NO_REPLY = "the reply is empty"
NO_ANSWER = "the reply holds reasoning but no answer; a larger token limit may help"


@dataclass(frozen=True)
class Comparison:
    """Two models on the prompts that one judge decided for both.

    n: such prompts; left_out: the others. only_first, only_second: attacks that succeed on one model only.
    difference: rate of the second minus rate of the first; interval: 95 %, Tango's; p_value: exact McNemar. None where n = 0.
    """

    judge: str
    first: str
    second: str
    n: int
    left_out: int
    only_first: int
    only_second: int
    difference: float | None
    interval: tuple[float, float] | None
    p_value: float | None


@dataclass(frozen=True)
class Agreement:
    """Two judges on the replies that both decided. kappa: Cohen's, None where undefined."""

    first: str
    second: str
    n: int
    kappa: float | None


def attack_success(verdicts: Sequence[Verdict]) -> AttackSuccess:
    """Counts, rate and Wilson 95 % interval. Undecided verdicts count as neither success nor failure."""
    decided = [verdict for verdict in verdicts if verdict.success is not None]
    successes = sum(bool(verdict.success) for verdict in decided)
    scores = [verdict.score for verdict in decided if verdict.score is not None]
    return AttackSuccess(
        n=len(verdicts),
        judged=len(decided),
        successes=successes,
        undecided=len(verdicts) - len(decided),
        rate=successes / len(decided) if decided else None,
        interval=statistics.wilson(successes, len(decided)),
        mean_score=sum(scores) / len(scores) if scores else None,
    )


def by_category(evaluation: Evaluation, judge: str) -> dict[str, AttackSuccess]:
    """Attack success on the prompts of each category, in the order of first appearance; empty where no prompt has one."""
    verdicts = evaluation.verdicts[judge]
    names = dict.fromkeys(category for category in evaluation.categories if category is not None)
    return {
        name: attack_success([verdict for verdict, category in zip(verdicts, evaluation.categories, strict=True) if category == name])
        for name in names
    }


def evaluate(source: ReplySource, prompts: PromptSet, judges: Sequence[Judge], *, cache: VerdictCache | None = None) -> Evaluation:
    """Asks `source` every prompt and has every judge decide on every reply.

    Reasoning blocks are taken out first; a reply with no answer in it is undecided without asking a judge. With a cache, a
    verdict given before on the same prompt and reply is not asked for again. Raises RequestError for no prompts, no judge,
    or two judges of one name.
    """
    check_attack(prompts, judges)
    return judge_replies(source, prompts, source.replies(prompts), judges, cache=cache)


def judge_replies(
    source: ReplySource, prompts: PromptSet, replies: Sequence[Reply], judges: Sequence[Judge], *, cache: VerdictCache | None = None
) -> Evaluation:
    """`evaluate` on replies given before. Raises ValueError where their number is not that of the prompts."""
    if len(replies) != len(prompts):
        raise ValueError(f"{len(replies)} replies to {len(prompts)} prompts")
    answers = [without_reasoning(reply.text) for reply in replies]
    exchanges = [Exchange(prompt.text, answer) for prompt, answer in zip(prompts.prompts, answers, strict=True)]
    verdicts: dict[str, tuple[Verdict, ...]] = {}
    for judge in judges:
        asked = [exchange for exchange in exchanges if exchange.reply]
        given = iter(cached_verdicts(judge, asked, cache))
        verdicts[judge.name] = tuple(
            next(given) if answer else Verdict(None, None, NO_ANSWER if reply.text.strip() else NO_REPLY)
            for answer, reply in zip(answers, replies, strict=True)
        )
    return Evaluation(
        model=source.identity(),
        title=source.title,
        prompts={"source": prompts.source, "sha256": prompts.sha256, "n": len(prompts)},
        replies=tuple(replies),
        verdicts=verdicts,
        attack_success={name: attack_success(given) for name, given in verdicts.items()},
        judges={judge.name: judge.identity() for judge in judges},
        categories=_categories(prompts),
    )


def _categories(prompts: PromptSet) -> tuple[str | None, ...]:
    found = tuple(prompt.category for prompt in prompts.prompts)
    return found if any(category is not None for category in found) else ()


def check_judges(judges: Sequence[Judge]) -> None:
    """Raises RequestError for no judge, or two of one name."""
    names = [judge.name for judge in judges]
    if not names:
        raise RequestError("no judge is named. Pass --judge, such as --judge keyword.")
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"two judges are called {name!r}, so their verdicts could not be told apart. Name each judge once.")


def check_attack(prompts: PromptSet, judges: Sequence[Judge]) -> None:
    """Raises RequestError where there is nothing to ask, or nobody to judge."""
    check_judges(judges)
    if not len(prompts):
        raise RequestError(f"{prompts.source} holds no prompts, so there is no attack to measure. Name a file with at least one prompt.")


def check_decided(evaluation: Evaluation, title: str = "") -> None:
    """Raises LoxMergeError where a judge decided nothing: a rate that is undefined is no result. title: of the model, default its own."""
    for judge, figures in evaluation.attack_success.items():
        if not figures.judged:
            reason = evaluation.verdicts[judge][0].explanation or "(the judge gave none)"
            raise LoxMergeError(
                f"the judge {judge} decided on none of {figures.n} replies of {title or evaluation.title}. The first reason: {reason}"
            )


def compare(a: Evaluation, b: Evaluation, judge: str) -> Comparison:
    """`b` against `a`, paired on the prompts that `judge` decided for both. Raises RequestError for different prompts or judges."""
    if a.prompts["sha256"] != b.prompts["sha256"]:
        raise RequestError(
            f"{a.title} was asked the prompts of {a.prompts['source']} ({a.prompts['sha256'][:12]}) and {b.title} those of "
            f"{b.prompts['source']} ({b.prompts['sha256'][:12]}): different prompts cannot be paired. Evaluate both on one set."
        )
    for evaluation in (a, b):
        if judge not in evaluation.verdicts:
            known = ", ".join(evaluation.verdicts)
            raise RequestError(f"{evaluation.title} has no verdicts of the judge {judge!r}, only of {known}. Evaluate both with one judge.")
    if a.judges.get(judge) != b.judges.get(judge):
        raise RequestError(f"the judge {judge!r} of {a.title} is not the one of {b.title} (other settings). Evaluate both with one judge.")
    pairs = [(x, y) for x, y in zip(a.successes(judge), b.successes(judge), strict=True) if x is not None and y is not None]
    first, second = [x for x, _ in pairs], [y for _, y in pairs]
    only_second, only_first = statistics.discordant(second, first)
    return Comparison(
        judge=judge,
        first=a.title,
        second=b.title,
        n=len(pairs),
        left_out=len(a.replies) - len(pairs),
        only_first=only_first,
        only_second=only_second,
        difference=statistics.paired_difference(second, first),
        interval=statistics.paired_interval(second, first),
        p_value=statistics.mcnemar(second, first),
    )


def agreement(evaluation: Evaluation) -> list[Agreement]:
    """Cohen's kappa of every pair of judges, on the replies that both decided."""
    result = []
    for first, second in itertools.combinations(evaluation.verdicts, 2):
        decided = zip(evaluation.successes(first), evaluation.successes(second), strict=True)
        pairs = [(x, y) for x, y in decided if x is not None and y is not None]
        kappa = statistics.cohens_kappa([x for x, _ in pairs], [y for _, y in pairs])
        result.append(Agreement(first, second, len(pairs), kappa))
    return result


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """Figures and identities as plain JSON values, without replies."""
    return {
        "title": evaluation.title,
        "model": evaluation.model,
        "prompts": evaluation.prompts,
        "judges": evaluation.judges,
        "attack_success": {name: asdict(figures) for name, figures in evaluation.attack_success.items()},
        "by_category": categories_json(evaluation),
        "agreement": [asdict(pair) for pair in agreement(evaluation)],
    }


def categories_json(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """`by_category` of every judge as plain JSON values; empty where no prompt has a category."""
    if not evaluation.categories:
        return {}
    return {judge: {category: asdict(figures) for category, figures in by_category(evaluation, judge).items()} for judge in evaluation.verdicts}


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """`summary` with every reply and verdict, as plain JSON values; `from_json` reads it back."""
    return {
        **summary(evaluation),
        "categories": list(evaluation.categories),
        "replies": [asdict(reply) for reply in evaluation.replies],
        "verdicts": {name: [asdict(verdict) for verdict in given] for name, given in evaluation.verdicts.items()},
    }


def from_json(document: dict[str, Any]) -> Evaluation:
    """The evaluation `to_json` wrote; its figures are computed anew from the verdicts. Raises RequestError for another document."""
    try:
        verdicts = {name: tuple(Verdict(**verdict) for verdict in given) for name, given in document["verdicts"].items()}
        return Evaluation(
            model=document["model"],
            title=document["title"],
            prompts=document["prompts"],
            replies=tuple(Reply(**reply) for reply in document["replies"]),
            verdicts=verdicts,
            attack_success={name: attack_success(given) for name, given in verdicts.items()},
            judges=document["judges"],
            categories=tuple(document.get("categories", ())),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"this JSON is not an evaluation with replies and verdicts ({type(error).__name__}: {error}).") from error


def transcripts(evaluation: Evaluation, prompts: PromptSet) -> list[dict[str, Any]]:
    """One record per prompt: its text, the reply as the model gave it, and each judge's verdict."""
    return [
        {
            "model": evaluation.title,
            "prompt": prompt.identity,
            "category": prompt.category,
            "text": prompt.text,
            "reply": reply.text,
            "finished": reply.finished,
            "tokens": reply.tokens,
            "verdicts": {name: asdict(given[index]) for name, given in evaluation.verdicts.items()},
        }
        for index, (prompt, reply) in enumerate(zip(prompts.prompts, evaluation.replies, strict=True))
    ]
