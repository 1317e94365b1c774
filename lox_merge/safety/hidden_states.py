"""Hidden states of a model at chosen layers and positions of given tokens, text by text, through transformers' own outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from lox_merge.errors import LoxMergeError, NumericalError
from lox_merge.safety.batches import is_out_of_memory, release_memory, right_padded
from lox_merge.safety.log_probabilities import ROWS, can_choose

# Before 5.21 transformers left the embeddings out of a list of layers, and counted the others from 0: all layers are kept there.
_CHOOSES_LAYERS = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 21)


@torch.no_grad()
def hidden_states(
    model: Any, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], layers: Sequence[int], *, batch_size: int = ROWS
) -> Iterator[tuple[int, Tensor]]:
    """(row number, (layers, positions, width) float32 on the CPU), one text after another, long ones first.

    rows: token numbers of each text. positions: of each row, not empty. layers: indices of transformers' `hidden_states`: 0 is what the
    first block reads (the embeddings), l what block l gives, and the last one, L, what the output head reads: after the final
    normalisation. Where the model can, the other layers are not kept. batch_size is halved when memory runs out.
    Raises NumericalError for NaN and Inf, LoxMergeError where a single row does not fit.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    training = model.training
    model.eval()
    try:
        while order:
            batch = order[:batch_size]
            states = _states(model, [rows[i] for i in batch], layers)
            if states is None:
                release_memory()
                batch_size = max(1, len(batch) // 2)
                continue
            for row, i in enumerate(batch):
                chosen = list(positions[i])
                # Layers of a spread model lie on several devices.
                values = torch.stack([state[row, chosen].float().cpu() for state in states])
                if not bool(torch.isfinite(values).all()):
                    raise NumericalError(
                        f"hidden states of text {i + 1} are not finite (NaN or Inf). Load the model in float32, or check its weights."
                    )
                yield i, values
            del order[: len(batch)], states
    finally:
        model.train(training)


def _states(model: Any, rows: Sequence[Sequence[int]], layers: Sequence[int]) -> list[Tensor] | None:
    """(rows, longest, width) of each layer; None when they did not fit."""
    tokens, mask = right_padded(rows, 0, model.device)
    # No scores are asked for, so as few as can be are computed.
    options = {"logits_to_keep": 1} if can_choose(model) else {}
    try:
        wanted = sorted(set(layers)) if _CHOOSES_LAYERS else True
        found = model(input_ids=tokens, attention_mask=mask, use_cache=False, output_hidden_states=wanted, **options).hidden_states
        return [found[layer] for layer in layers]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(rows) == 1:
            raise LoxMergeError(
                f"memory ran out on a text of {len(rows[0])} tokens. Leave it out, take fewer --layers, or use a smaller dtype."
            ) from error
    return None
