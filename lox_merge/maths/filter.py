"""The projection filter: a fine-tuning update kept to, or kept out of, directions of the alignment delta.

"Safety subspaces are not distinct" (Ponkshe et al. 2025), Eqs. 5 and 6, with Δ_ft = W_ft − W_align and P(M) = U_k U_kᵀ M:
parallel    W = W_align + P(Δ_ft)
orthogonal  W = W_align + Δ_ft − P(Δ_ft)
The paper's text projects on right singular vectors, its code on left ones; left is the default. Safe LoRA (Hsu et al. 2024,
arXiv 2405.16833) and SafeMERGE (Djuhera et al. 2025, arXiv 2503.17239) decide with the same operator, layer by layer.
The streaming job, the mergekit method and the tests call these functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lox_merge.errors import RecipeError
from lox_merge.maths.directions import BASES, Basis, Directions, random_directions, random_k_directions, top_directions
from lox_merge.maths.edits import Realised, apply_update, full_rank_update
from lox_merge.maths.lanczos import DEFAULT_TOLERANCE
from lox_merge.maths.precision import float32_difference, frobenius_norm, full_precision_matmul
from lox_merge.maths.rank import RankRule, rank_rule
from lox_merge.maths.rounding import Rounding
from lox_merge.maths.subspace import Side
from lox_merge.maths.update import Update
from lox_merge.typed_fields import check_choice

Mode = Literal["parallel", "orthogonal"]
MODES: tuple[str, ...] = get_args(Mode)
# What became of one matrix: projected, left as fine-tuned (above the threshold), or merged with the aligned weights.
Decision = Literal["filtered", "kept", "merged"]


@dataclass(frozen=True)
class Projection:
    """P(Δ_ft) as thin factors, and how much of Δ_ft it is.

    update: T = P(Δ_ft). norm, finetuned_norm: ‖T‖_F and ‖Δ_ft‖_F. cosine: cos(T, Δ_ft), None where one of them is 0.
    kept_random: √(k/d), the root mean square of ‖T‖/‖Δ_ft‖ over Haar-random subspaces of the same rank; None for a
    projector that is none (Safe LoRA's).
    """

    update: Update
    norm: float
    finetuned_norm: float
    cosine: float | None
    kept_random: float | None

    @property
    def kept(self) -> float | None:
        """‖P(Δ_ft)‖_F / ‖Δ_ft‖_F; None for Δ_ft = 0. Its square is the paper's energy-kept ratio."""
        return self.norm / self.finetuned_norm if self.finetuned_norm else None


def project_on(directions: Directions, finetuned_delta: Float[Tensor, "d_out d_in"], side: Side = "left") -> Projection:
    """P(M) = U_k U_kᵀ M (left) or M V_k V_kᵀ (right) for M = Δ_ft, float32, not changed.

    directions: (d_out, k) for left, (d_in, k) for right. P is idempotent, so cos(P(M), M) = ‖P(M)‖/‖M‖.
    """
    vectors = directions.vectors
    with full_precision_matmul(finetuned_delta.device):
        if side == "left":
            coordinates = vectors.T @ finetuned_delta
            update = Update(vectors, coordinates.T)
        else:
            coordinates = finetuned_delta @ vectors
            update = Update(coordinates, vectors)
    whole = frobenius_norm(finetuned_delta)
    # Rounding may lift a projection on everything above 1.
    norm = min(frobenius_norm(coordinates), whole)
    return Projection(update, norm, whole, norm / whole if norm else None, math.sqrt(directions.rank / vectors.shape[0]))


def project_by_delta(delta: Float[Tensor, "d_out d_in"], finetuned_delta: Float[Tensor, "d_out d_in"], side: Side = "left") -> Projection:
    """C·M with C = ΔΔᵀ/‖Δ‖_F, the published Safe LoRA (arXiv 2405.16833, its approximation of Δ(ΔᵀΔ)⁻¹Δᵀ); M·ΔᵀΔ/‖Δ‖_F on the right.

    C is symmetric, but not idempotent and in the units of Δ, so ‖C·M‖ says little; the cosine is what decides. A zero Δ gives 0.
    """
    with full_precision_matmul(delta.device):
        norm = frobenius_norm(delta)
        scaled = delta / norm if norm else delta
        # Of the two orders of multiplication the one whose inner matrix is the smaller.
        if side == "left":
            update = Update(delta @ scaled.T, finetuned_delta.T) if delta.shape[0] <= delta.shape[1] else Update(scaled, finetuned_delta.T @ delta)
        else:
            update = Update(finetuned_delta, delta.T @ scaled) if delta.shape[1] <= delta.shape[0] else Update(finetuned_delta @ scaled.T, delta.T)
        size, whole = update.norm(None), frobenius_norm(finetuned_delta)
        overlap = float(update.inner_product(finetuned_delta))
    return Projection(update, size, whole, overlap / (size * whole) if size and whole else None, None)


def write_filtered(
    aligned: Float[Tensor, "d_out d_in"],
    finetuned: Float[Tensor, "d_out d_in"],
    projection: Projection,
    mode: Mode = "parallel",
    *,
    dtype: torch.dtype | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    out: Float[Tensor, "d_out d_in"] | None = None,
) -> tuple[Float[Tensor, "d_out d_in"], Realised]:
    """W_align + P(Δ_ft) or W_align + Δ_ft − P(Δ_ft) in `dtype` (default: finetuned's), and what of ±P(Δ_ft) survived rounding.

    Orthogonal is written as W_ft − P(Δ_ft), which is the same and rounds once: what is measured is what was taken away.
    """
    kind = dtype or finetuned.dtype
    if mode == "parallel":
        return apply_update(aligned, projection.update, dtype=kind, rounding=rounding, seed=seed, out=out)
    assert projection.update.left is not None
    taken = Update(-projection.update.left, projection.update.right)
    return apply_update(finetuned, taken, dtype=kind, rounding=rounding, seed=seed, out=out)


def write_merged(
    aligned: Float[Tensor, "d_out d_in"],
    finetuned_delta: Float[Tensor, "d_out d_in"],
    weight: float,
    *,
    dtype: torch.dtype | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    out: Float[Tensor, "d_out d_in"] | None = None,
) -> tuple[Float[Tensor, "d_out d_in"], Realised]:
    """W_align + (1 − w)·Δ_ft: SafeMERGE's linear merge (arXiv 2503.17239), the aligned weights in the place of its safe model.

    weight: w in [0, 1], the aligned model's share. The authors merge with a model tuned on safety data (w = 0.2 and less).
    """
    update = full_rank_update(1 - weight)
    return apply_update(aligned, update, dtype=dtype or aligned.dtype, rounding=rounding, delta=finetuned_delta, seed=seed, out=out)


def find_directions(
    delta: Float[Tensor, "d_out d_in"], rank: int, basis: Basis = "top", side: Side = "left", *, tolerance: float = DEFAULT_TOLERANCE, seed: int = 0
) -> Directions:
    """The `rank` directions that a basis means: leading ones of Δ_align, some of its own at random, or a Haar-random subspace."""
    if basis == "top":
        return top_directions(delta, rank, side, tolerance=tolerance, seed=seed)
    if basis == "random-k":
        return random_k_directions(delta, rank, side, seed=seed)
    return random_directions(delta.shape[0 if side == "left" else 1], rank, seed=seed, device=delta.device)


def filter_matrix(
    base: Float[Tensor, "d_out d_in"],
    aligned: Float[Tensor, "d_out d_in"],
    finetuned: Float[Tensor, "d_out d_in"],
    rank: RankRule | int | str,
    mode: Mode = "orthogonal",
    *,
    basis: Basis = "top",
    side: Side = "left",
    dtype: torch.dtype | None = None,
    rounding: Rounding = "nearest",
    tolerance: float = DEFAULT_TOLERANCE,
    seed: int = 0,
) -> Float[Tensor, "d_out d_in"]:
    """One filtered matrix, Eq. 5 or 6, from stored weights of any float dtype; deltas are float32, subtracted in float64 where weights are.

    rank: how many directions, or a share of the short side ('10%'). Raises RecipeError for settings that are none.

    A vector is an (n, 1) matrix and rank 1: P(u) = ⟨u, v⟩/⟨v, v⟩ · v with v = Δ_align, and 0 for v = 0.
    """
    for name, value, allowed in (("mode", mode, MODES), ("basis", basis, BASES), ("side", side, get_args(Side))):
        check_choice(name, value, allowed)
    rule = rank_rule(rank)
    count = int(rule.value) if rule.kind == "fixed" else rule.from_shape(min(aligned.shape))
    if count is None:
        raise RecipeError(f"rank {rule} depends on the spectrum; a projection takes a number of directions or a share such as '10%'.")
    directions = find_directions(float32_difference(aligned, base), count, basis, side, tolerance=tolerance, seed=seed)
    projection = project_on(directions, float32_difference(finetuned, aligned), side)
    return write_filtered(aligned, finetuned, projection, mode, dtype=dtype, rounding=rounding, seed=seed)[0]
