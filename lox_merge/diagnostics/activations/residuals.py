"""Residuals of domains at the last layer: their leading directions, and how far two domains share them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.stats import beta
from torch import Tensor

from lox_merge.diagnostics.activations.results import Agreement, DomainPair, Residual
from lox_merge.maths.activations import PermutedCosines, direction_cosines, leading
from lox_merge.safety.progress import CountProgress

VECTORS = ("mean", "last")


def example_vector(states: Tensor, vector: str) -> Tensor:
    """h_L(x), (width,) float32: the mean over the states of the last layer (positions, width) that were read, or the last of them."""
    return states.mean(0) if vector == "mean" else states[-1].clone()


def residual(rows: Tensor, count: int) -> Residual:
    """rows: (n, d), one difference an example."""
    found, without = leading(rows), leading(rows, centred=True)
    mean = rows.double().mean(0)
    size = float(mean.norm())
    return Residual(
        _shares(found.squares, found.total, count),
        _shares(without.squares, without.total, count),
        len(rows) * size**2 / found.total if found.total else None,
        float((found.directions[:, 0] @ mean).abs()) / size if size and len(found.squares) else None,
        found.directions[:, :count],
    )


def _shares(squares: Tensor, total: float, count: int) -> tuple[float, ...]:
    return tuple(float(square) / total for square in squares[:count])


def compared(names: Sequence[str], residuals: Sequence[Tensor], *, count: int, permutations: int, seed: int, bar: CountProgress) -> list[DomainPair]:
    """Every two domains."""
    found = []
    for i, first in enumerate(residuals):
        for j, second in enumerate(residuals[:i]):
            one, other = (
                _agreement(second, first, centred=centred, count=count, permutations=permutations, seed=seed, bar=bar) for centred in (False, True)
            )
            found.append(DomainPair(names[j], names[i], one, other))
    return found


def _agreement(first: Tensor, second: Tensor, *, centred: bool, count: int, permutations: int, seed: int, bar: CountProgress) -> Agreement:
    width = first.shape[1]
    # cos² of a random unit vector with a fixed one has the Beta law of (1/2, (d − 1)/2).
    law = beta(0.5, (width - 1) / 2)
    cosines = direction_cosines(leading(first, centred=centred), leading(second, centred=centred), count)
    observed = float(cosines[0, 0]) if cosines.numel() else None
    generator = torch.Generator().manual_seed(seed)
    source = PermutedCosines(first, second, 1, centred=centred)
    drawn = []
    for _ in range(permutations):
        values = source.draw(generator)
        bar.advance(1)
        if values is not None:
            drawn.append(float(values[0, 0]))
    values = torch.tensor(drawn, dtype=torch.float64)
    known = len(drawn) > 0 and observed is not None
    return Agreement(
        tuple(tuple(min(1.0, float(value)) for value in row) for row in cosines),
        float(values.mean()) if known else None,
        float(values.quantile(0.95)) if known else None,
        # Draws that repeat the sets themselves differ from them by rounding only.
        (1 + int((values <= observed + 1e-9).sum())) / (1 + len(drawn)) if known and observed is not None else None,
        (1 + int((values >= observed - 1e-9).sum())) / (1 + len(drawn)) if known and observed is not None else None,
        math.exp(math.lgamma(width / 2) - math.lgamma((width + 1) / 2)) / math.sqrt(math.pi),
        math.sqrt(law.ppf(0.95)),
        float(law.sf(observed**2)) if observed is not None else None,
    )
