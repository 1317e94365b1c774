"""Utility beside attack success: what each rank costs on harmless work, measured on the model that is in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lox_merge.errors import RequestError
from lox_merge.safety.divergence import Reference, kl_divergence, reference_log_probabilities
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.lm_eval_tasks import check_lm_eval, lm_eval_scores
from lox_merge.safety.prompts import load_prompts, read_text
from lox_merge.safety.types import PromptSet
from lox_merge.safety.utility import Questions, exact_match, load_questions, perplexity

# Each prompt keeps 4 bytes × positions × vocabulary of the aligned model; the place where a reply begins is what matters most.
_LAST_POSITIONS = 8


class UtilityMeasures:
    """Exact match on questions, perplexity of texts, KL from aligned on harmless prompts, lm-eval's tasks; what is not given is left out.

    The first call must find the aligned weights in the model: they are the reference of the KL divergence. task_limit: examples of
    each task.
    """

    def __init__(
        self,
        questions: Questions | None = None,
        texts: Sequence[str] = (),
        harmless: PromptSet | None = None,
        tasks: Sequence[str] = (),
        task_limit: int | None = None,
    ) -> None:
        self._questions, self._texts, self._harmless = questions, tuple(texts), harmless
        self._tasks, self._task_limit = tuple(tasks), task_limit
        self._reference: Reference | None = None

    def identity(self) -> dict[str, Any]:
        """What decides the figures: hashes of questions, texts and prompts, and the tasks. Plain JSON values."""
        return {
            "questions": None if self._questions is None else [self._questions.prompts.sha256, _sha256(self._questions.answers)],
            "texts": _sha256(self._texts),
            "harmless": None if self._harmless is None else self._harmless.sha256,
            "tasks": list(self._tasks),
            "task_limit": self._task_limit,
        }

    def __bool__(self) -> bool:
        return self._questions is not None or bool(self._texts) or self._harmless is not None or bool(self._tasks)

    def __call__(self, source: LocalModel) -> dict[str, float | None]:
        """'exact match' (rate), 'perplexity', 'KL' (nats per position), and 'task metric' of each lm-eval task."""
        found: dict[str, float | None] = {}
        if self._questions is not None:
            with source.storing(None):  # its store is for the harmful prompts
                found["exact match"] = exact_match(source, self._questions).rate
        if self._texts:
            found["perplexity"] = perplexity(source.model, source.tokenizer, self._texts).value
        if self._harmless is not None:
            if self._reference is None:
                self._reference = reference_log_probabilities(source.model, source.tokenizer, self._harmless, source.rendering, last=_LAST_POSITIONS)
            found["KL"] = kl_divergence(self._reference, source.model).value
        if self._tasks:
            scores = lm_eval_scores(source.model, source.tokenizer, self._tasks, batch_size=source.padded_batch_size(), limit=self._task_limit)
            found |= {f"{task} {metric}": value for task, metrics in scores.items() for metric, value in metrics.items()}
        return found


def _sha256(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def load_measures(
    questions: Path | None = None,
    text: Path | None = None,
    harmless: str | None = None,
    *,
    tasks: Sequence[str] = (),
    task_limit: int | None = None,
    cache_dir: Path | None = None,
) -> UtilityMeasures:
    """Measures from files (questions and answers; one plain text; harmless prompts) and names of lm-eval's tasks. Raises RequestError."""
    if tasks:
        check_lm_eval(tasks)
    texts: tuple[str, ...] = ()
    if text is not None:
        texts = (read_text(text),)
        if not texts[0].strip():
            raise RequestError(f"{text} is empty, so it has no perplexity. Give a text file with some text.")
    return UtilityMeasures(
        load_questions(questions) if questions is not None else None,
        texts,
        load_prompts(harmless, cache_dir=cache_dir) if harmless is not None else None,
        tasks,
        task_limit,
    )
