"""Next-token log-probabilities of a model at chosen positions of given tokens: one forward pass a batch, scores only where they are asked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lox_merge.errors import LoxMergeError, NumericalError
from lox_merge.safety.batches import is_out_of_memory, release_memory, right_padded

ROWS = 8
"""Texts at a time, unless told otherwise: scores of the whole vocabulary take more memory than anything else."""


@torch.no_grad()
def log_probabilities(
    model: Any, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], *, batch_size: int = ROWS
) -> Iterator[tuple[int, Tensor]]:
    """(row number, (positions, vocabulary) float32 on the model's device): log p(· | tokens up to and with that position), in nats.

    rows: token numbers of each text. positions: of each row, ascending and not empty. Rows come in an order that their lengths alone
    decide, long ones first, so two models can be read side by side. One tensor of scores is in memory at a time; its rows are
    widened to float32 one by one. batch_size is halved when memory runs out. Raises NumericalError for NaN, LoxMergeError where
    a single row does not fit.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    training = model.training
    model.eval()
    try:
        while order:
            batch = order[:batch_size]
            # Not before the first position that any row asks for: prompts are long, and their scores of no use.
            first = min(positions[i][0] for i in batch)
            scores = _scores(model, [rows[i] for i in batch], first)
            if scores is None:
                release_memory()
                batch_size = max(1, len(batch) // 2)
                continue
            for i, row in zip(batch, scores, strict=True):
                chosen = torch.tensor(positions[i], device=row.device) - first
                values = row.index_select(0, chosen).float().log_softmax(-1)
                if values.isnan().any():
                    raise NumericalError(f"the model's scores of text {i} are not numbers (NaN). Load it in float32, or check its weights.")
                yield i, values
            del order[: len(batch)], scores, row
    finally:
        model.train(training)


def _scores(model: Any, rows: Sequence[Sequence[int]], first: int) -> Tensor | None:
    """Logits (rows, longest − first, vocabulary) from position `first` on; None when they did not fit."""
    tokens, mask = right_padded(rows, 0, model.device)
    try:
        if can_choose(model):
            kept = {"logits_to_keep": tokens.shape[1] - first}
            chosen: Tensor = model(input_ids=tokens, attention_mask=mask, use_cache=False, **kept).logits
            return chosen
        whole: Tensor = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        return whole[:, first:]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(rows) == 1:
            raise LoxMergeError(f"memory ran out on a text of {len(rows[0])} tokens. Leave it out, or use a smaller dtype.") from error
    return None


def can_choose(model: Any) -> bool:
    """Whether the model computes scores at chosen positions only; one with code of its own may not."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
