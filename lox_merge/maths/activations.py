"""Directions in hidden states: projections on them, what swapped labels would separate, how far leading directions of two sets agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Squared, about what rounding to float32 changes in a sum of states.
_ROUNDING = 1e-13


def scalar_projection(
    states: Float[Tensor, "layers positions width"], direction: Float[Tensor, "layers positions width"]
) -> Float[Tensor, " layers"]:
    """⟨z, v⟩/‖v‖ of the flattened states, per layer, in float64; NaN where v = 0 ("Re-Emergent Misalignment", Giordani 2025)."""
    flat = direction.double().flatten(1)
    products = torch.linalg.vecdot(states.double().flatten(1), flat)
    norms = torch.linalg.vector_norm(flat, dim=1)
    return torch.where(norms > 0, products / norms, torch.nan)


def swapped_norm(sums: Float[Tensor, "folds positions width"], counts: Float[Tensor, "folds positions"]) -> float | None:
    """√E‖v‖² if a coin had swapped base and aligned in each text: √Σ_p Σ_i ‖D_i‖²/n_p², D_i = z_i(aligned) − z_i(base).

    sums: Σ D_i by fold and position, float64. counts: texts a fold has there. Single texts are not kept: Σ_i ‖D_i‖² = n‖D̄‖² + (n − 1) S with
    the variance S estimated from what the folds' means differ by; exact where each fold holds one text. None where one fold alone
    has several texts of a position.
    """
    total, texts = sums.sum(0), counts.sum(0)
    mean = total / texts[:, None]
    with_any = (counts > 0).sum(0)
    if bool(((with_any < 2) & (texts > 1)).any()):
        return None
    apart = (sums / counts.clamp_min(1)[..., None] - mean).square().sum(-1)
    variance = (counts * apart).sum(0) / (with_any - 1).clamp_min(1)
    squares = texts * mean.square().sum(-1) + (texts - 1) * variance
    return float((squares / texts.square()).sum().sqrt())


@dataclass(frozen=True)
class Leading:
    """squares: (r,) squared singular values, descending. directions: (d, r), orthonormal. total: the squared Frobenius norm. All float64."""

    squares: Tensor
    directions: Tensor
    total: float


def leading(rows: Float[Tensor, "n d"], *, centred: bool = False) -> Leading:
    """Right singular vectors of rows (n, d) by the Gram matrix of their shorter side, in float64. centred: of rows minus their mean.

    Directions that rounding cannot tell from none are left out; r = 0 for rows of zeros.
    """
    values = rows.double()
    energy = float(values.square().sum())
    if centred:
        values = values - values.mean(0)
    if values.shape[0] > values.shape[1]:
        return leading_of_gram(values.T @ values, energy=energy)
    squares, left = _descending(values @ values.T, energy)
    return Leading(squares, values.T @ (left / squares.sqrt()), float(values.square().sum()) if len(squares) else 0.0)


def leading_of_gram(gram: Float[Tensor, "d d"], *, energy: float) -> Leading:
    """The same from Rᵀ R, (d, d) float64. energy: ‖R‖²_F before a mean was taken from it, which left its rounding behind."""
    squares, directions = _descending(gram, energy)
    return Leading(squares, directions, float(gram.trace()) if len(squares) else 0.0)


def _descending(gram: Tensor, energy: float) -> tuple[Tensor, Tensor]:
    squares, vectors = torch.linalg.eigh(gram)
    squares, vectors = squares.flip(0), vectors.flip(1)
    # An eigenvalue is only known up to about n · eps of the largest one; float32 states up to eps² of their energy.
    known = squares > max(gram.shape[0] * torch.finfo(torch.float64).eps * float(squares[0]), _ROUNDING * energy)
    return squares[known], vectors[:, known]


def direction_cosines(first: Leading, second: Leading, count: int) -> Float[Tensor, "i j"]:
    """|cos| between the leading `count` directions of two sets, (i, j) float64; fewer where a set has fewer."""
    return (first.directions[:, :count].T @ second.directions[:, :count]).abs()


class PermutedCosines:
    """|cos| between leading directions of two sets whose rows are shuffled: as alike as if every row came from both.

    first, second: (n, d), (m, d). The pooled Gram matrix, (n + m)² float64, is made once; each draw takes parts of it.
    """

    def __init__(self, first: Tensor, second: Tensor, count: int, *, centred: bool) -> None:
        pooled = torch.cat([first, second]).double()
        self._gram, self._first, self._centred = pooled @ pooled.T, first.shape[0], centred
        self._count = min(count, *first.shape, *second.shape)

    def draw(self, generator: torch.Generator) -> Tensor | None:
        """(j, j) float64; None where a half has no direction left."""
        order = torch.randperm(self._gram.shape[0], generator=generator)
        one, other = order[: self._first], order[self._first :]
        across = self._part(one, other)
        squares, left = _descending(self._part(one, one), self._energy(one))
        other_squares, right = _descending(self._part(other, other), self._energy(other))
        if not len(squares) or not len(other_squares):
            return None
        left, right = (left / squares.sqrt())[:, : self._count], (right / other_squares.sqrt())[:, : self._count]
        return (left.T @ across @ right).abs()

    def _part(self, rows: Tensor, columns: Tensor) -> Tensor:
        part = self._gram[rows][:, columns]
        if self._centred:
            part = part - part.mean(0) - part.mean(1, keepdim=True) + part.mean()
        return part

    def _energy(self, rows: Tensor) -> float:
        return float(self._gram.diagonal()[rows].sum())
