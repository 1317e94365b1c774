"""What a model is good for: perplexity on texts, and exact match on questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lox_merge.errors import NumericalError, RequestError
from lox_merge.safety.chat import Rendering, render
from lox_merge.safety.prompts import column_of, prompt_set, read_rows, refuse_rows
from lox_merge.safety.statistics import wilson
from lox_merge.safety.types import Prompt, PromptSet, ReplySource

# As transformers' own guide to perplexity: every window repeats half of the one before, so no token has a short context.
WINDOW, STRIDE = 1024, 512


@dataclass(frozen=True)
class Perplexity:
    """value: exp of the mean negative log-likelihood (nats) over all scored tokens of all texts. None where nothing was scored.

    n: scored tokens; the first token of a text has no context and is not scored. texts: how many were given.
    """

    value: float | None
    n: int
    texts: int


@dataclass(frozen=True)
class ExactMatch:
    """rate: replies equal to their answer up to white space, of n questions, with Wilson 95 % interval. None for n = 0."""

    rate: float | None
    correct: int
    n: int
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Questions:
    """Questions as prompts, and the answer to each, in order."""

    prompts: PromptSet
    answers: tuple[str, ...]


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: Sequence[str], *, window: int | None = None, stride: int | None = None) -> Perplexity:
    """Token-weighted perplexity. Texts longer than a window are read in windows that begin every `stride` tokens.

    Every token but a text's first is scored once, with at least window − stride tokens before it where the text has them.
    window: at most 1024 and the model's context by default; stride: half of it. Float32 log-softmax, float64 sums.
    Raises RequestError for sizes that cannot be, NumericalError for scores that are not finite.
    """
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    window = window if window is not None else min(WINDOW, room or WINDOW)
    stride = stride if stride is not None else max(1, min(STRIDE, window // 2))
    if not 1 <= stride < window or (room is not None and window > room):
        raise RequestError(f"window {window} and stride {stride}: 1 ≤ stride < window ≤ {room or 'any'} (the model's context) is needed.")
    training = model.training
    model.eval()
    try:
        total, count = 0.0, 0
        for text in texts:
            tokens = render(tokenizer, text, Rendering(chat_template=False)) if text.strip() else []
            for begin, scored in _windows(len(tokens), window, stride):
                total += _negative_log_likelihood(model, tokens[begin : begin + window], scored)
                count += scored
    finally:
        model.train(training)
    if not math.isfinite(total):
        raise NumericalError("the model's scores of the text are not finite (NaN or Inf). Load it in bfloat16 or float32, or check its weights.")
    try:
        value = math.exp(total / count) if count else None
    except OverflowError:
        raise NumericalError(
            f"the mean negative log-likelihood is {total / count:.4g} nats; no float64 holds its exponential. Check the model."
        ) from None
    return Perplexity(value, count, len(texts))


def _windows(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Where each window begins, and how many of its last tokens are scored there for the first time."""
    found, end = [], 1
    for begin in range(0, max(length, 0), stride):
        new_end = min(begin + window, length)
        if new_end > end:
            found.append((begin, new_end - end))
        end = new_end
        if end == length:
            break
    return found


def _negative_log_likelihood(model: Any, tokens: list[int], scored: int) -> float:
    """Sum in nats over the last `scored` tokens of one window."""
    inputs = torch.tensor([tokens], device=model.device)
    scores = model(input_ids=inputs, use_cache=False).logits[0, -scored - 1 : -1].float()
    losses = torch.nn.functional.cross_entropy(scores, inputs[0, -scored:].to(scores.device), reduction="none")
    return float(losses.double().sum())


def load_questions(path: Path, *, question: str | None = None, answer: str | None = None) -> Questions:
    """Question and answer columns of a CSV, JSONL or JSON file. Raises RequestError as `load_prompts` does."""
    rows = read_rows(path)
    table = [row for row in rows if isinstance(row, dict)]
    if not table:
        raise RequestError(f"{path.name} holds no rows with a question and an answer. Give a .csv, .jsonl or .json file with both columns.")
    names = [
        column_of(table, question, ("question", "prompt", "goal", "text"), path.name),
        column_of(table, answer, ("answer", "target", "output", "label"), path.name),
    ]
    texts = [[row.get(name) for row in table] for name in names]
    for name, values in zip(names, texts, strict=True):
        # Data sets of sums have numbers for answers; a bool or a list is no text either way.
        refuse_rows(
            values, lambda value: isinstance(value, bool) or not isinstance(value, (str, int, float)), f"{path.name}: column {name} holds no text"
        )
        refuse_rows(values, lambda value: not str(value).strip(), f"{path.name}: column {name} is empty")
    prompts = [Prompt(str(position), str(text)) for position, text in enumerate(texts[0])]
    return Questions(prompt_set(prompts, path.name), tuple(map(str, texts[1])))


def exact_match(source: ReplySource, questions: Questions) -> ExactMatch:
    """Asks every question; a reply is correct when it equals the answer after white space is made single and stripped."""
    replies = source.replies(questions.prompts) if len(questions.prompts) else []
    correct = sum(_normal(reply.text) == _normal(answer) for reply, answer in zip(replies, questions.answers, strict=True))
    n = len(replies)
    return ExactMatch(correct / n if n else None, correct, n, wilson(correct, n))


def _normal(text: str) -> str:
    return " ".join(text.split())
