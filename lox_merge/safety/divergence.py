"""KL(aligned ‖ model) on harmless prompts: how far a change of weights moved what the model says where nothing should move."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lox_merge.errors import NumericalError, RequestError
from lox_merge.maths.distributions import kl_divergence as divergence_of
from lox_merge.safety.chat import Rendering, check_rendering, render
from lox_merge.safety.log_probabilities import ROWS, log_probabilities
from lox_merge.safety.types import PromptSet


@dataclass(frozen=True)
class Divergence:
    """value: mean KL in nats over next-token positions; None where there are none. n: positions. prompts: how many."""

    value: float | None
    n: int
    prompts: int


@dataclass(frozen=True)
class Reference:
    """What one model expects after every position of some prompts, kept so that only one model need be in memory.

    log_probabilities: per prompt, (positions, vocabulary), float32, on the CPU: 4 bytes × positions × vocabulary in all.
    tokens: per prompt, as rendered then. sha256: of the tokens.
    """

    log_probabilities: tuple[Tensor, ...] = field(repr=False)
    tokens: tuple[tuple[int, ...], ...] = field(repr=False)
    sha256: str


def reference_log_probabilities(
    model: Any, tokenizer: Any, prompts: PromptSet, rendering: Rendering | None = None, *, last: int | None = None, batch_size: int = ROWS
) -> Reference:
    """Next-token log-probabilities of `model` after every token of the rendered prompts.

    The position after the last token, where a reply begins, is one of them. last: only so many at each prompt's end, which
    saves memory and leaves out what a chat template writes before every prompt. Raises RequestError, NumericalError.
    """
    if last is not None and last < 1:
        raise RequestError(f"the last {last} positions of a prompt are none; give 1 or more.")
    used = rendering or Rendering()
    check_rendering(tokenizer, used)
    rows = [render(tokenizer, prompt.text, used) for prompt in prompts.prompts]
    kept: dict[int, Tensor] = {}
    positions = [range(max(0, len(row) - (last or len(row))), len(row)) for row in rows]
    for i, values in log_probabilities(model, rows, positions, batch_size=batch_size):
        kept[i] = values.cpu()
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return Reference(tuple(kept[i] for i in range(len(rows))), tuple(map(tuple, rows)), digest)


def kl_divergence(reference: Reference, model: Any, *, batch_size: int = ROWS) -> Divergence:
    """Mean over positions of KL(reference ‖ model) = Σ_v p_ref (log p_ref − log p_model), nats, float32, summed in float64.

    The model reads the tokens of the reference, so both saw the same. Raises RequestError for another vocabulary size,
    NumericalError where a probability is not finite or the model rules out what the reference does not.
    """
    total, count = 0.0, 0
    lengths = [len(values) for values in reference.log_probabilities]
    positions = [range(len(row) - length, len(row)) for row, length in zip(reference.tokens, lengths, strict=True)]
    for i, values in log_probabilities(model, reference.tokens, positions, batch_size=batch_size):
        expected = reference.log_probabilities[i].to(values.device)
        if expected.shape != values.shape:
            raise RequestError(
                f"the reference has {expected.shape[1]:,} tokens in its vocabulary and the model {values.shape[1]:,}; "
                "KL needs the same. Compare models of one pair."
            )
        total += float(divergence_of(expected, values).sum())
        count += len(values)
    if count and not torch.isfinite(torch.tensor(total)):
        raise NumericalError("the KL divergence is not finite: the model rules out a token that the reference expects. Check the model's weights.")
    return Divergence(total / count if count else None, count, len(lengths))
