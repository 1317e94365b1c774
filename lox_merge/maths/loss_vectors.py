"""Cosines of two vectors of token losses, beside what their sizes alone would give."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lox_merge.maths.geometry import cosine


@dataclass(frozen=True)
class LossCosines:
    """cosine: ⟨a, b⟩/(‖a‖‖b‖). centred: the same of a − mean(a) and b − mean(b), Pearson's correlation; chance is 0.

    shuffled: what the cosine is on average over all orders of one vector's entries, n·mean(a)·mean(b)/(‖a‖‖b‖). Losses are not
    negative, so this is far above 0. None where a vector (centred: its deviation) is zero.
    """

    cosine: float | None
    centred: float | None
    shuffled: float | None


def loss_cosines(first: Float[Tensor, " n"], second: Float[Tensor, " n"]) -> LossCosines:
    """first, second: (n,) negative log-likelihoods of the same n tokens in nats; products and sums in float64."""
    a, b = first.double(), second.double()
    count, norms = len(a), (float(a.norm()), float(b.norm()))
    means = float(a.mean()), float(b.mean())
    centred = None
    # Equal losses have no deviation; what rounding leaves of it has a direction of its own.
    if bool((a != a[0]).any()) and bool((b != b[0]).any()):
        x, y = a - means[0], b - means[1]
        centred = cosine(float(x @ y), float(x.norm()), float(y.norm()))
    return LossCosines(cosine(float(a @ b), *norms), centred, cosine(count * math.prod(means), *norms))
