"""One model's losses and gradients of the same completions under two framings: one forward and one partial backward pass a text."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lox_merge.diagnostics.framing.pairs import Framed, Pair
from lox_merge.diagnostics.framing.results import Mean, ModelCosines, PairCosines
from lox_merge.errors import LoxMergeError, NumericalError, RequestError
from lox_merge.maths.geometry import cosine
from lox_merge.maths.loss_vectors import LossCosines, loss_cosines
from lox_merge.safety.batches import free_memory, is_out_of_memory
from lox_merge.safety.progress import CountProgress

# Gradients that are held at once: of this pair and the last one under both framings, and both sums.
_HELD = 6
_CHUNK = 2**20


@dataclass
class _Gradient:
    """Of the chosen weights, float32 or wider, with its norm."""

    parts: list[Tensor]
    norm: float = field(init=False)

    def __post_init__(self) -> None:
        self.norm = math.sqrt(_product(self.parts, self.parts))

    def cosine(self, other: _Gradient) -> float | None:
        return cosine(_product(self.parts, other.parts), self.norm, other.norm)


def measure_model(
    label: str, model: Any, pairs: Sequence[Pair], weights: dict[str, nn.Parameter], progress: CountProgress, seed: int
) -> ModelCosines:
    """All figures of one model. Its weights, their requires_grad and its mode are left as they were.

    Gradients are of the mean negative log-likelihood over the shared completion tokens, so every pair counts alike. Raises
    RequestError where the gradients would not fit into memory, NumericalError for NaN, LoxMergeError when memory runs out.
    """
    entries = sum(weight.numel() for weight in weights.values())
    _check_room(model, entries)
    found: list[PairCosines] = []
    losses: list[tuple[Tensor, Tensor]] = []
    sums: list[list[Tensor]] = [[], []]
    same: list[float | None] = []
    crossed: list[float | None] = []
    before: tuple[tuple[int, ...], list[_Gradient]] | None = None
    with _only_these(model, weights):
        for pair in pairs:
            seen = [_losses_and_gradient(model, framed, list(weights.values()), pair.rows[place]) for place, framed in _framings(pair)]
            gradients = [_Gradient(parts) for _, parts in seen]
            losses.append((seen[0][0], seen[1][0]))
            for total, gradient in zip(sums, gradients, strict=True):
                _add(total, gradient.parts)
            if before is not None and before[0] != pair.completion:
                same += [one.cosine(other) for one, other in zip(before[1], gradients, strict=True)]
                crossed.append(before[1][0].cosine(gradients[1]))
            found.append(_figures(pair, *losses[-1], gradients[0].cosine(gradients[1])))
            before = pair.completion, gradients
            progress.advance(1)
    sides = [_Gradient(total) for total in sums]
    others = _other_losses(pairs, losses)
    return ModelCosines(
        model=label,
        **{name: Mean.of([getattr(pair, name) for pair in found], seed) for name in ("loss", "centred", "shuffled", "gradient")},
        other_loss=Mean.of([other.cosine for other in others], seed),
        other_centred=Mean.of([other.centred for other in others], seed),
        mean_gradient=sides[0].cosine(sides[1]),
        same_framing=Mean.of(same, seed),
        other_completion=Mean.of(crossed, seed),
        weights=tuple(weights),
        entries=entries,
        band=1.96 / math.sqrt(entries),
        pairs=tuple(found),
    )


def _framings(pair: Pair) -> tuple[tuple[int, Framed], ...]:
    return ((0, pair.first), (1, pair.second))


def _figures(pair: Pair, first: Tensor, second: Tensor, gradient: float | None) -> PairCosines:
    cosines = loss_cosines(first, second)
    means = float(first.mean()), float(second.mean())
    return PairCosines(pair.rows, len(first), pair.excluded, means, cosines.cosine, cosines.centred, cosines.shuffled, gradient)


def _other_losses(pairs: Sequence[Pair], losses: Sequence[tuple[Tensor, Tensor]]) -> list[LossCosines]:
    """Cosines of a completion's losses with those of the next, different one under the other framing, as far as both go."""
    values = []
    for place in range(len(pairs) - 1):
        if pairs[place].completion != pairs[place + 1].completion:
            first, second = losses[place][0], losses[place + 1][1]
            length = min(len(first), len(second))
            values.append(loss_cosines(first[:length], second[:length]))
    return values


def _losses_and_gradient(model: Any, framed: Framed, weights: Sequence[nn.Parameter], row: int) -> tuple[Tensor, list[Tensor]]:
    """(n,) float64 losses of the completion's tokens on the CPU, and the gradient of their mean, float32 or wider, of every weight."""
    tokens = torch.tensor([framed.tokens], device=model.device)
    first = framed.positions[0] - 1
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    try:
        with torch.enable_grad():
            if "logits_to_keep" in inspect.signature(model.forward).parameters:
                logits = model(input_ids=tokens, logits_to_keep=tokens.shape[1] - first, **options).logits[0]
            else:
                logits = model(input_ids=tokens, **options).logits[0, first:]
            positions = torch.tensor(framed.positions, device=logits.device)
            scores = logits.index_select(0, positions - 1 - first)
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(-1)
            losses = -scores.gather(1, tokens[0].to(logits.device)[positions][:, None])[:, 0]
            gradients = torch.autograd.grad(losses.mean(), weights, allow_unused=True)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise LoxMergeError(f"memory ran out on row {row}, {len(framed.tokens)} tokens. Use a narrower dtype, or leave it out.") from error
    # An expert that no token was sent to has no gradient.
    parts = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
    parts = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
    if not bool(torch.isfinite(losses).all()) or not all(bool(torch.isfinite(part).all()) for part in parts):
        raise NumericalError(f"the loss or the gradient of row {row} is not finite. Load the model in float32 (--dtype), or check its weights.")
    return losses.detach().double().cpu(), parts


@contextmanager
def _only_these(model: Any, weights: dict[str, nn.Parameter]) -> Iterator[None]:
    """Gradients of these weights alone, so that the backward pass ends at the first of them; everything as it was afterwards."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training = model.training
    model.eval()
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in weights)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
        model.train(training)


def _product(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """⟨a, b⟩ over all tensors: products and sums in float64, a piece at a time."""
    total = 0.0
    for one, other in zip(first, second, strict=True):
        for a, b in zip(torch.split(one.reshape(-1), _CHUNK), torch.split(other.reshape(-1), _CHUNK), strict=True):
            total += float(a.double() @ b.to(a.device).double())
    return total


def _add(total: list[Tensor], parts: Sequence[Tensor]) -> None:
    if not total:
        total.extend(torch.zeros_like(part) for part in parts)
    for sum_, part in zip(total, parts, strict=True):
        sum_ += part


def _check_room(model: Any, entries: int) -> None:
    needed, free = _HELD * 4 * entries, free_memory(model.device)
    if needed > free:
        raise RequestError(
            f"gradients of {entries:,} weights need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free. Choose fewer weights by --module."
        )
