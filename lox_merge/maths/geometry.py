"""What spectra and inner products say of a delta: energies, effective ranks, overlaps of subspaces, angles.

A spectrum here is (squares, total): squared singular values as far as they were computed, descending, and ||A||²_F. A value
that the computed ones cannot decide is None, and so is one that is undefined (A = 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

ENERGY_LEVELS = (0.5, 0.9, 0.99)
# At a cosine of 0.7 half of an update's squared norm points straight back along −Δ_align: more of it undoes alignment than does
# anything else. Fine-tuning, harmful too, stays far below (on the toy under 0.2, see docs/project.md).
REVERTING_COSINE = 0.7
# A cumulative energy that rounding left this far below its target has reached it.
_ROUNDING = 1e-9


def leading_count(squares: Float[Tensor, " j"], total: float, energy: float) -> int | None:
    """The fewest leading directions that hold at least `energy` of ||A||²_F; None when more than j are needed, or A = 0.

    squares: (j,) float64, descending. energy: in (0, 1].
    """
    if total == 0 or squares.numel() == 0:
        return None
    reached = torch.cumsum(squares, 0) >= energy * total * (1 - _ROUNDING)
    return int(reached.to(torch.uint8).argmax()) + 1 if bool(reached[-1]) else None


@dataclass(frozen=True)
class EffectiveRanks:
    """How many directions a matrix acts in.

    energy_50, energy_90, energy_99: the fewest that hold this share of ||A||²_F. stable: ||A||²_F/s_1² (Rudelson & Vershynin 2007).
    participation: (Σ s²)²/Σ s⁴, the inverse Simpson index of the energies.
    """

    energy_50: int | None
    energy_90: int | None
    energy_99: int | None
    stable: float | None
    participation: float | None


def effective_ranks(squares: Float[Tensor, " j"], total: float, *, complete: bool) -> EffectiveRanks:
    """All of them from one spectrum; complete: whether `squares` holds every singular value that is not zero."""
    known = total > 0 and squares.numel() > 0
    half, most, nearly_all = (leading_count(squares, total, level) for level in ENERGY_LEVELS)
    stable = total / float(squares[0]) if known else None
    participation = float(squares.sum()) ** 2 / float(squares.square().sum()) if known and complete else None
    return EffectiveRanks(half, most, nearly_all, stable, participation)


def count_above(squares: Float[Tensor, " j"], following: float | None, edge: float, *, complete: bool) -> int | None:
    """How many singular values exceed `edge`; None when all j computed ones do and more may follow.

    following: the next singular value, where it is known.
    """
    above = int((squares > edge**2).sum())
    if above < squares.numel() or complete or (following is not None and following <= edge):
        return above
    return None


def squared_overlaps(first: Float[Tensor, "d i"], second: Float[Tensor, "d j"]) -> Float[Tensor, "i j"]:
    """(first_a · second_b)² of two orthonormal bases, float64 on the CPU: every MSO of their leading parts is a sum of these."""
    return (first.T @ second).double().square().cpu()


def mode_subspace_overlap(overlaps: Float[Tensor, "i j"], count_a: int, count_b: int) -> float:
    """MSO = ||Q_A^T Q_B||²_F / min(k_A, k_B) of the leading k_A and k_B directions ("Safety subspaces are not distinct", Eq. 10).

    overlaps: from `squared_overlaps`. 0 for orthogonal, 1 for nested subspaces.
    """
    return float(overlaps[:count_a, :count_b].sum()) / min(count_a, count_b)


def expected_overlap(count_a: int, count_b: int, dimension: int) -> float:
    """E MSO of independent Haar-random subspaces: max(k_A, k_B)/d (ibid., Eq. 11)."""
    return max(count_a, count_b) / dimension


def cosine(product: float, norm: float, other_norm: float) -> float | None:
    """⟨a, b⟩/(‖a‖‖b‖) within [-1, 1]; None where a or b is zero."""
    if norm == 0 or other_norm == 0:
        return None
    return max(-1.0, min(1.0, product / (norm * other_norm)))


@dataclass(frozen=True)
class Products:
    """What cosines of task vectors need, additive over tensors: squared norms and products of Δ_align and Δ_ft.

    total: ‖Δ_align + Δ_ft‖², formed from the sum itself: from the other three it would cancel where fine-tuning undoes alignment.
    """

    aligned: float = 0.0
    update: float = 0.0
    product: float = 0.0
    total: float = 0.0

    def __add__(self, other: Products) -> Products:
        return Products(self.aligned + other.aligned, self.update + other.update, self.product + other.product, self.total + other.total)

    @property
    def update_to_total(self) -> float | None:
        """cos(τ_u→ft, τ_ft): of what fine-tuning did with the whole way from the base model."""
        return cosine(self.update + self.product, math.sqrt(self.update), math.sqrt(self.total))

    def update_to_total_at(self, angle: float) -> float | None:
        """cos(τ_u→ft, τ_ft) if cos(τ_u→ft, τ_u) were `angle`: at 0, what an update of this length in a random direction gives."""
        one, other = math.sqrt(self.update), math.sqrt(self.aligned)
        return cosine(one + angle * other, 1.0, math.sqrt(max(0.0, self.update + self.aligned + 2 * angle * one * other))) if one else None

    @property
    def update_to_alignment(self) -> float | None:
        """cos(τ_u→ft, τ_u): of what fine-tuning did with what alignment did."""
        return cosine(self.product, math.sqrt(self.update), math.sqrt(self.aligned))

    @property
    def safety_angle(self) -> float | None:
        """cos φ_T = cos(τ_T, −τ_safety) (Hsiung et al. 2025): above 0, fine-tuning walks against the alignment."""
        value = self.update_to_alignment
        return None if value is None else -value


def inner_products(delta: Float[Tensor, "rows columns"], update: Float[Tensor, "rows columns"], rows_at_once: int) -> tuple[float, float]:
    """⟨Δ_align, Δ_ft⟩ and ‖Δ_align + Δ_ft‖_F: rows in float32, their sums in float64; no third matrix is formed.

    delta, update: (rows, columns) float32 on one device.
    """
    product, total = torch.zeros(2, dtype=torch.float64, device=delta.device)
    for start in range(0, delta.shape[0], rows_at_once):
        one, other = delta[start : start + rows_at_once], update[start : start + rows_at_once]
        product += torch.linalg.vecdot(one, other).double().sum()
        total += torch.linalg.vector_norm(one + other, dim=1).double().square().sum()
    return float(product), math.sqrt(float(total))
