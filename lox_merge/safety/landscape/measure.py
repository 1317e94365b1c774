"""One point measured: replies, verdicts, utility; and a model that is broken there is said to be, not scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lox_merge.errors import NumericalError
from lox_merge.safety.asr import evaluate
from lox_merge.safety.cache import VerdictCache
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.landscape.results import PointResult
from lox_merge.safety.types import Evaluation, Judge, PromptSet

ModelUtility = Callable[[LocalModel], Mapping[str, float | None]]

NOT_FINITE = "the model's scores were not finite (NaN or Inf) while it answered"
NOT_JUDGED = "no judge decided on any reply"


class FiniteWatch:
    """Whether the scores of the next token were numbers. Greedy decoding would take NaN for a token, and a judge its text for a reply."""

    def __init__(self) -> None:
        self._broken: torch.Tensor | None = None

    def __call__(self, module: Any, arguments: Any, output: Any) -> None:
        last = output.logits[:, -1]
        # -Inf is how a model may rule a token out; a row of nothing else is broken too, and its maximum shows it.
        highest = last.amax(-1)
        broken = ~torch.isfinite(highest).all() | torch.isnan(last).any()
        # Kept on the device: asking for the value at every token would stop the GPU.
        self._broken = broken if self._broken is None else self._broken | broken

    @property
    def broken(self) -> bool:
        return self._broken is not None and bool(self._broken)


@contextmanager
def watched(model: Any) -> Iterator[FiniteWatch]:
    """Looks at every output of `model` for the time of a `with` statement."""
    watch = FiniteWatch()
    handle = model.register_forward_hook(watch)
    try:
        yield watch
    finally:
        handle.remove()


def measure_point(
    source: LocalModel,
    prompts: PromptSet,
    judges: Sequence[Judge],
    utility: ModelUtility | None,
    *,
    cache: VerdictCache | None = None,
    change_seconds: float = 0.0,
) -> tuple[PointResult, Evaluation | None]:
    """The model as it is now. A broken one gives a result that says why it is undefined, not an error."""
    started = time.perf_counter()
    evaluation = None
    undefined: str | None = None
    with watched(source.model) as watch:
        try:
            evaluation = evaluate(source, prompts, judges, cache=cache)
        except (RuntimeError, ValueError, IndexError):
            # Sampling from NaN raises; what fails on a whole model is no finding and has to be seen.
            if not watch.broken:
                raise
    if watch.broken:
        undefined = NOT_FINITE
    elif evaluation is not None and not any(found.judged for found in evaluation.attack_success.values()):
        undefined = NOT_JUDGED
    seconds = time.perf_counter() - started
    measured, why = _utility(source, utility) if undefined != NOT_FINITE else ({}, None)
    whole = evaluation is not None and undefined != NOT_FINITE
    result = PointResult(
        attack_success=dict(evaluation.attack_success) if evaluation is not None and whole else {},
        finished=sum(reply.finished for reply in evaluation.replies) / len(evaluation.replies) if evaluation is not None and whole else None,
        utility=measured,
        undefined=undefined,
        utility_undefined=why,
        change_seconds=change_seconds,
        evaluation_seconds=seconds,
    )
    return result, evaluation


def _utility(source: LocalModel, utility: ModelUtility | None) -> tuple[dict[str, float | None], str | None]:
    if utility is None:
        return {}, None
    try:
        return dict(utility(source)), None
    except NumericalError as error:  # as perplexity beyond what a float64 holds
        return {}, str(error)
