"""What rows that come one batch at a time spread into: kept as they are while they are few, as a Gram matrix once a sum is smaller."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lox_merge.maths.activations import Leading, leading, leading_of_gram

_ROWS_AT_ONCE = 256


class Scatter:
    """Rows of width d. Up to d of them are held as float32; more are added up into Σ x xᵀ, (d, d) float64."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._rows: list[Tensor] = []
        self._gram: Tensor | None = None
        self._sum = torch.zeros(width, dtype=torch.float64)
        self.count = 0

    def add(self, rows: Float[Tensor, "n d"]) -> None:
        """rows: (n, d) on the CPU."""
        self._rows.append(rows.float().clone())
        self._sum += rows.double().sum(0)
        self.count += rows.shape[0]
        # Few rows at a time would make many products of the whole matrix.
        if len(self._rows) >= _ROWS_AT_ONCE if self._gram is not None else self.count > self._width:
            self._fold()

    def __add__(self, other: Scatter) -> Scatter:
        both = Scatter(self._width)
        both._rows = [*self._rows, *other._rows]
        both._sum, both.count = self._sum + other._sum, self.count + other.count
        grams = [part._gram for part in (self, other) if part._gram is not None]
        both._gram = sum(grams[1:], grams[0].clone()) if grams else None
        return both

    def leading(self, *, centred: bool) -> Leading:
        """Singular values and directions of all rows. centred: of rows minus their mean."""
        if self._gram is None:
            rows = torch.cat(self._rows) if self._rows else torch.zeros(1, self._width)
            return leading(rows, centred=centred)
        self._fold()
        gram, energy = self._gram, float(self._gram.trace())
        if centred:
            mean = self._sum / self.count
            gram = gram - self.count * torch.outer(mean, mean)
        return leading_of_gram(gram, energy=energy)

    def _fold(self) -> None:
        if self._gram is None:
            self._gram = torch.zeros(self._width, self._width, dtype=torch.float64)
        if self._rows:
            rows = torch.cat(self._rows).double()
            self._gram += rows.T @ rows
            self._rows = []
