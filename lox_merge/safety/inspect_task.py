"""The protocol of `lox-merge asr` as an inspect_ai task, so that `inspect eval` and its log viewer work on hardened models.

    inspect eval lox_merge/safety/inspect_task.py@attack_success --model hf/local -M model_path=hardened -M do_sample=False \
        -T prompts=advbench.csv -T judge=openai:gpt-4.1

`do_sample=False` is greedy decoding of inspect_ai's hf provider; a temperature of 0 is refused by it. Where `lox-merge asr` and
this task differ: inspect_ai renders the chat itself, so there is no bare prompt and no prefill.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import anyio
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessage, ChatMessageSystem, ChatMessageUser, GenerateConfig
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
from inspect_ai.solver import TaskState, generate

from lox_merge.safety import statistics
from lox_merge.safety.asr import NO_REPLY
from lox_merge.safety.cache import VerdictCache, cached_verdicts
from lox_merge.safety.judges.factory import JudgeOptions, make_judge
from lox_merge.safety.prompts import load_prompts
from lox_merge.safety.reasoning import without_reasoning
from lox_merge.safety.types import Exchange, Judge, Verdict

# Requests at a time to a served judge. Others are asked one by one: they share one model, or are a user's plain functions.
_SERVED_AT_ONCE = 8


@task
def attack_success(
    prompts: str,
    judge: str = "keyword",
    column: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    system: str | None = None,
    max_new_tokens: int = 60,
    judge_endpoint: str | None = None,
    judge_key_variable: str = "OPENAI_API_KEY",
    rubric: str | None = None,
    threshold: float | None = None,
    cache: bool = True,
) -> Task:
    """ASR on `prompts` by `judge`, with the meanings of the options of `lox-merge asr`. Raises RequestError as that does."""
    options = JudgeOptions(
        endpoint=judge_endpoint, key_variable=judge_key_variable, rubric=None if rubric is None else Path(rubric), threshold=threshold
    )
    made = make_judge(judge, options)
    asked = load_prompts(prompts, column=column, split=split, limit=limit, seed=seed)
    samples = [
        Sample(input=_messages(prompt.text, system), id=prompt.identity, metadata={"prompt": prompt.text, "category": prompt.category})
        for prompt in asked.prompts
    ]
    return Task(
        dataset=MemoryDataset(samples, name=asked.source),
        solver=generate(),
        scorer=judged(made, cache),
        config=GenerateConfig(max_tokens=max_new_tokens),
        metadata={"prompts": asked.source, "prompts_sha256": asked.sha256, "judge": made.identity()},
    )


def _messages(prompt: str, system: str | None) -> list[ChatMessage]:
    user = ChatMessageUser(content=prompt)
    return [user] if system is None else [ChatMessageSystem(content=system), user]


@metric
def attack_success_rate() -> Metric:
    """Successes / judged replies; NaN where nothing was judged. inspect_ai leaves unscored samples out and counts them apart."""
    return _of_counts(lambda successes, judged: successes / judged)


@metric
def wilson_low() -> Metric:
    """Lower end of the Wilson 95 % interval."""
    return _of_counts(lambda successes, judged: (statistics.wilson(successes, judged) or (math.nan,))[0])


@metric
def wilson_high() -> Metric:
    """Upper end of the Wilson 95 % interval."""
    return _of_counts(lambda successes, judged: (statistics.wilson(successes, judged) or (math.nan,))[-1])


def _of_counts(figure: Any) -> Metric:
    def compute(scores: list[SampleScore]) -> float:
        values = [score.score.as_float() for score in scores]
        judged = [value for value in values if not math.isnan(value)]
        return float(figure(int(sum(judged)), len(judged))) if judged else math.nan

    return compute


@scorer(metrics=[attack_success_rate(), wilson_low(), wilson_high()])
def judged(judge: str | Judge = "keyword", cache: bool = True) -> Scorer:
    """A judge of lox-merge as scorer: 1 where the attack succeeded, 0 where not, NaN (unscored) where undecided."""
    made = make_judge(judge) if isinstance(judge, str) else judge
    kept = VerdictCache() if cache else None
    at_once = anyio.Semaphore(_SERVED_AT_ONCE if made.identity().get("kind") == "openai" else 1)

    async def score(state: TaskState, target: Target) -> Score:
        reply = without_reasoning(state.output.completion)
        prompt = state.metadata.get("prompt", state.input_text)
        if not reply:
            return _score(Verdict(None, None, NO_REPLY), reply)
        async with at_once:
            (verdict,) = await anyio.to_thread.run_sync(cached_verdicts, made, [Exchange(prompt, reply)], kept)
        return _score(verdict, reply)

    return score


def _score(verdict: Verdict, reply: str) -> Score:
    # NaN is inspect_ai's mark of a sample without a score; its "N" (no answer) would count as 0, that is, as safe.
    value = math.nan if verdict.success is None else float(verdict.success)
    return Score(value=value, answer=reply, explanation=verdict.explanation or None, metadata={"score": verdict.score})
