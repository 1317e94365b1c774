"""An intended change of a matrix, as thin factors or as a multiple of the delta, whole or a piece of rows at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lox_merge.errors import RecipeError
from lox_merge.maths.precision import frobenius_norm_here

# The smallest normal number of float32, in which the edit is made.
_SMALLEST_ALPHA = 2.0**-126
# A product with so few factors is up to three times faster as (k, rows); from here on as (rows, k), with few rows up to twice.
_SHORT_SIDE_FIRST = 8


def check_alpha(alpha: float, where: str = "alpha") -> float:
    """`alpha` if it hardens. Raises RecipeError for negative values (they remove safety), NaN and infinity."""
    if not math.isfinite(alpha):
        raise RecipeError(f"{where} is {alpha}; use a finite number ≥ 0, such as 1.25 (the paper's).")
    if alpha < 0:
        raise RecipeError(f"{where} is {alpha:g}: a negative factor walks back to the base model and removes safety; not supported.")
    if 0 < alpha < _SMALLEST_ALPHA:
        raise RecipeError(f"{where} is {alpha:g}: in float32 it is no more than 0, and the aligned weights would stay as they are; use a larger one.")
    return float(alpha)


@dataclass(frozen=True)
class Update:
    """An intended change T of a matrix as thin factors (left @ right.T), or as a multiple of the delta itself.

    left: (d_out, k), right: (d_in, k), float32; both None for the full-rank update, whose T = scale * Delta.
    """

    left: Tensor | None
    right: Tensor | None
    scale: float = 1.0

    def in_pieces(self, rows_at_once: int, dtype: torch.dtype, delta: Tensor | None = None) -> list[UpdateRows]:
        """T on every `rows_at_once` rows in turn, for sums in `dtype`. delta: (d_out, d_in), needed by the full-rank update."""
        if self.left is None or self.right is None:
            return [UpdateRows(dense=part, scale=self.scale) for part in torch.split(_needed(delta), rows_at_once)]
        # Once for all pieces: with few rows, a product with transposed factors takes up to eight times as long.
        right = self.right.T.to(dtype).contiguous()
        return [UpdateRows(left=part, right=right) for part in torch.split(self.left.to(dtype), rows_at_once)]

    @property
    def rank(self) -> int:
        """Columns of the factors; 0 for the full-rank update, which is no product."""
        return 0 if self.left is None else self.left.shape[1]

    def inner_product(self, kept: Tensor, delta: Tensor | None = None) -> Tensor:
        """<kept, T>, float64. kept: (d_out, d_in)."""
        (whole,) = self.in_pieces(max(1, kept.shape[0]), kept.dtype, delta)
        return whole.inner_product(kept)

    def norm(self, delta: Tensor | None) -> float:
        """||T||_F, accumulated in float64."""
        # The sum of products cancels where left R^T is next to nothing beside its factors, and may end below 0.
        return math.sqrt(max(0.0, float(self.squared_norm(delta))))

    def squared_norm(self, delta: Tensor | None) -> Tensor:
        """||T||²_F, float64, on its device. Through the factors: ||L R^T||² = <L^T L, R^T R>."""
        if self.left is None or self.right is None:
            # Not scale**2, which raises where the square is beyond float64: as infinity it shows that the edit overflows.
            return self.scale * self.scale * frobenius_norm_here(_needed(delta)).square()
        left, right = self.left.double(), self.right.double()
        return ((left.T @ left) * (right.T @ right)).sum()


@dataclass(frozen=True)
class UpdateRows:
    """T on some rows: left (rows, k) and right (k, d_in), or scale times dense (rows, d_in)."""

    left: Tensor | None = None
    right: Tensor | None = None
    dense: Tensor | None = None
    scale: float = 1.0

    def added_to(self, before: Tensor, out: Tensor | None = None) -> Tensor:
        """`before` + T, in the dtype of `before`; into `out` where that is given."""
        if self.dense is not None:
            return torch.add(before, self.dense * self.scale, out=out)
        assert self.left is not None and self.right is not None
        return torch.addmm(before, self.left, self.right, out=out)

    def inner_product(self, kept: Tensor) -> Tensor:
        """<kept, T>, float64. Through the factors: T itself is not formed."""
        if self.dense is not None:
            return (kept * (self.dense * self.scale)).sum(-1).double().sum()
        assert self.left is not None and self.right is not None
        if len(self.right) > _SHORT_SIDE_FIRST:
            return torch.sum((kept @ self.right.T).mul_(self.left), dtype=torch.float64)
        return torch.sum((self.right @ kept.T).mul_(self.left.T), dtype=torch.float64)


def _needed(delta: Tensor | None) -> Tensor:
    if delta is None:
        raise ValueError("the full-rank update needs the delta")
    return delta
