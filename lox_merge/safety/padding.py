"""Whether a model says the same in a batch as alone: neither other prompts nor what is put in front of a short one should play a part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lox_merge.safety.batches import is_out_of_memory, left_padded, release_memory

# Of the scores' spread. The shape of a batch alone moves them by rounding: in 16 bits by a few hundredths in deep models, which rows of
# one length show, too. Much more in those is no rounding.
_ALLOWED, _ALLOWED_IN_16_BITS = 1e-3, 0.05
_TIMES_WITHOUT_PADDING, _TIMES_BROKEN = 4, 3
# Some layers go wrong a few tokens later, where they take up what they kept of the prompt.
_STEPS = 4
# Odd: layers that take blocks of 4 or 128 tokens together cut them elsewhere then.
_FEW = 5
# Some models give words that they must not say a score such as the smallest number there is.
_NEVER = 1e6
Together = Literal["any", "alike", "one"]
_known: WeakKeyDictionary[Any, Together] = WeakKeyDictionary()


def allowed_together(model: Any, rows: Sequence[Sequence[int]], padding: int) -> Together | None:
    """Which prompts may be asked in one batch: 'any', 'alike' (in length) or 'one'. The model's generation config is the one to be used.

    'alike' where ends of the longest of `rows` are answered in another way beside all of it than by themselves, by more than rounding:
    recurrent layers that take no mask see the padding, layers that compress blocks of tokens cut them elsewhere. 'one' where another
    row of the same length changes it, too. Found out once for a model: it depends on its layers, not on its weights. Through
    `generate`, which gives positions as the model wants them. None where memory is too short for two rows of this length.
    """
    if len(rows) < 2:
        return "any"
    if model not in _known:
        try:
            _known[model] = _look(model, max(rows, key=len), padding)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            release_memory()
            return None
    return _known[model]


def _look(model: Any, longest: Sequence[int], padding: int) -> Together:
    ends = [longest[-max(2, length) :] for length in (len(longest) - _FEW, len(longest) // 2, len(longest) // 4)]
    allowed = _ALLOWED if model.dtype.itemsize > 2 else _ALLOWED_IN_16_BITS
    alone = [_answer(model, [row], padding) for row in ends]
    moved = _distance([_answer(model, [row, longest], padding) for row in ends], alone)
    if moved <= allowed:
        return "any"
    others = [_answer(model, [row, row[::-1]], padding) for row in ends]
    without = max(_distance([one], [other]) for one, other in zip(others, alone, strict=True))
    if not without <= _TIMES_BROKEN * allowed:
        return "one"
    return "any" if moved <= _TIMES_WITHOUT_PADDING * without else "alike"


@torch.no_grad()
def _answer(model: Any, rows: list[Sequence[int]], padding: int) -> tuple[Tensor, list[int]]:
    """Scores (steps, vocabulary), float32, and tokens of what follows the first row."""
    tokens, mask = left_padded(rows, padding, model.device)
    steps = min(_STEPS, model.generation_config.max_new_tokens or _STEPS)  # there may be no room for more
    found = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack([scores[0].float() for scores in found.logits]), found.sequences[0, tokens.shape[1] :].tolist()


def _distance(ones: list[tuple[Tensor, list[int]]], others: list[tuple[Tensor, list[int]]]) -> float:
    """Median of ‖one − other‖ over the spread of the other, of all steps that follow the same tokens; NaN where most are not finite.

    Not the largest: rounding alone sends a token to another expert now and then.
    """
    found = []
    for (first, tokens), (second, expected) in zip(ones, others, strict=True):
        same = 1 + next((step for step, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), len(tokens) - 1)
        possible = (second.isfinite() & (second.abs() < _NEVER)).all(0)
        first, second = first[:, possible], second[:, possible]
        spread = (second - second.mean(-1, keepdim=True)).norm(dim=-1).clamp_min(torch.finfo(second.dtype).tiny)
        found += ((first - second).norm(dim=-1) / spread)[:same].tolist()
    return float(torch.tensor(found).median())
