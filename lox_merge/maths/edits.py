"""The LoX edit, its equal-norm controls, and the writing of an update into a stored dtype.

LoX (Perin et al. 2025, arXiv 2506.15606): W_lox = W_align + alpha * Proj_k(Delta), Delta = W_align - W_base.
Every function takes tensors and returns tensors; the streaming job, the mergekit method and in-memory search call these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lox_merge.errors import NumericalError
from lox_merge.maths.grid import Grid
from lox_merge.maths.lanczos import DEFAULT_TOLERANCE
from lox_merge.maths.pieces import piece_buffer, row_pieces, rows_at_once
from lox_merge.maths.precision import float32_difference, frobenius_norm, full_precision_matmul, rounding_noise_edge
from lox_merge.maths.rank import RankRule, rank_rule
from lox_merge.maths.rounding import ROUNDINGS, Rounding, round_stochastic
from lox_merge.maths.spectral import truncated_svd
from lox_merge.maths.subspace import Subspace
from lox_merge.maths.transport import to_device
from lox_merge.maths.update import Update, check_alpha
from lox_merge.typed_fields import check_choice

# Rounding again after adding back what is missing inside the subspace: rank 6 needs 4 to 8 rounds, high ranks more.
FEEDBACK_ROUNDS = 40
FEEDBACK_GAIN_ERROR = 0.002
# An odd 64-bit multiplier (Steele & Vigna 2021, table 4).
_STREAM = 0xD1342543DE82EF95
# At ranks near the short side many entries stay below the rounding threshold whatever is added: stop when a round gains little.
_FEEDBACK_PROGRESS = 0.98


@dataclass(frozen=True)
class Realised:
    """What of the intended update T survived writing: R = out - W_align in float32.

    gain: <R, T>/||T||²; cosine: cos(R, T); intended_norm and realised_norm: Frobenius norms, units of the weights.
    None where T = 0 (gain, cosine) or R = 0 (cosine).
    """

    gain: float | None
    cosine: float | None
    intended_norm: float
    realised_norm: float


def lox_update(subspace: Subspace, alpha: float) -> Update:
    """T = alpha * U_k S_k V_k^T as thin factors: (d_out, k) and (d_in, k)."""
    return Update(subspace.left * to_device((alpha * subspace.singular_values).to(subspace.left.dtype), subspace.left.device), subspace.right)


def full_rank_update(alpha: float) -> Update:
    """T = alpha * Delta (ExPO, Zheng et al. 2024, arXiv 2404.16792): rank 'full'."""
    return Update(None, None, alpha)


def apply_update(
    aligned: Float[Tensor, "d_out d_in"],
    update: Update,
    *,
    dtype: torch.dtype | None = None,
    rounding: Rounding = "nearest",
    delta: Float[Tensor, "d_out d_in"] | None = None,
    seed: int = 0,
    out: Float[Tensor, "d_out d_in"] | None = None,
    grid: Grid | None = None,
) -> tuple[Float[Tensor, "d_out d_in"], Realised]:
    """W_align + T in `dtype` (default: aligned's own) and what of T survived.

    aligned: (d_out, d_in), any float dtype, not changed. delta: (d_out, d_in) float32, needed by the full-rank update.
    out: where to write; its dtype then is the output's. grid: the values that a quantised output can hold; `out` is float32 then.
    rounding: 'nearest'; 'stochastic' (seeded, unbiased); 'feedback' adds the part of T that is missing inside T's own
    row and column space back and rounds to nearest again, until the gain is within FEEDBACK_GAIN_ERROR of 1
    or no longer improves (ranks near the short side). Raises NumericalError where the result overflows its dtype, RecipeError for
    another rounding.
    """
    check_choice("rounding", rounding, ROUNDINGS)
    if out is None:
        out = torch.empty(aligned.shape, dtype=dtype or aligned.dtype, device=aligned.device)
    lossless = grid is None and out.dtype in (torch.float32, torch.float64)
    if rounding == "stochastic" and not lossless:
        # A stream of its own: weights or start vectors drawn from the same small seed would correlate with the rounding.
        generator = torch.Generator(device=aligned.device).manual_seed((seed * _STREAM + 1) % 2**63)
        return out, _write(aligned, update, delta, _at_random(out.dtype, grid, generator), out=out)
    nearest = _to_nearest(grid)
    realised = _write(aligned, update, delta, nearest, out=out)
    if rounding == "feedback" and not lossless and realised.intended_norm:
        realised = _with_feedback(aligned, update, delta, out, realised, nearest)
    return out, realised


# Rounds float32 values of some rows of a matrix.
_Rounder = Callable[[Tensor, slice], Tensor]


def _to_nearest(grid: Grid | None) -> _Rounder:
    # What is copied into a stored dtype is rounded to nearest by the copy.
    return grid.round if grid is not None else lambda values, _: values


def _at_random(dtype: torch.dtype, grid: Grid | None, generator: torch.Generator) -> _Rounder:
    if grid is not None:
        return lambda values, rows: grid.round(values, rows, "stochastic", generator)
    return lambda values, _: round_stochastic(values, dtype, generator)


def _write(
    aligned: Tensor,
    update: Update,
    delta: Tensor | None,
    rounder: _Rounder,
    *,
    out: Tensor,
    target: Update | None = None,
) -> Realised:
    """One rounding of W_align + update into `out`; judged against `target` (default: the update itself)."""
    target = target or update
    wide = torch.promote_types(aligned.dtype, torch.float32)  # float64 weights keep their digits
    product = torch.zeros((), dtype=torch.float64, device=aligned.device)
    row_norms = torch.empty(aligned.shape[0], dtype=wide, device=aligned.device)
    rank = update.rank
    earlier, later = piece_buffer(aligned, wide, rank), piece_buffer(aligned, wide, rank)
    step = rows_at_once(aligned, rank)
    updates = update.in_pieces(step, wide, delta)
    targets = updates if target is update else target.in_pieces(step, wide, delta)
    parts = (torch.split(matrix, step) for matrix in (aligned, out, row_norms))
    pieces = zip(row_pieces(aligned, rank), *parts, updates, targets, strict=True)
    with full_precision_matmul(aligned.device):
        for rows, stored, written, norms, change, intended in pieces:
            before, kept = earlier[: len(stored)].copy_(stored), later[: len(stored)]
            written.copy_(rounder(change.added_to(before, kept), rows))
            kept.copy_(written).sub_(before)
            product += intended.inner_product(kept)
            # Row norms in the working dtype, their sum in float64: the same care as frobenius_norm.
            torch.linalg.vector_norm(kept, dim=-1, out=norms)
        # One tensor to wait for, not three.
        figures = torch.stack([product, row_norms.double().norm(), target.squared_norm(delta).sqrt()])
    overlap, kept_norm, intended_norm = figures.tolist()
    if not math.isfinite(kept_norm):
        raise NumericalError(
            f"the edited matrix of shape {tuple(aligned.shape)} overflows {str(out.dtype).removeprefix('torch.')}; "
            "use a smaller alpha, or dtype float32"
        )
    gain = overlap / intended_norm**2 if intended_norm else None
    cosine = overlap / (kept_norm * intended_norm) if kept_norm and intended_norm else None
    return Realised(gain, cosine, intended_norm, kept_norm)


def _with_feedback(aligned: Tensor, update: Update, delta: Tensor | None, out: Tensor, realised: Realised, nearest: _Rounder) -> Realised:
    """Round, measure what is missing inside the update's own subspace, add it, round again (deterministic)."""
    if update.left is None or update.right is None:
        # Scaling Delta up and down cannot repair it: entries of a rounded delta are a few units in the last place, and
        # all of them cross the rounding threshold together.
        raise NumericalError("rounding 'feedback' needs an update of limited rank; use 'stochastic' or float32 for rank 'full'")
    with full_precision_matmul(aligned.device):
        rows_basis = torch.linalg.qr(update.left).Q
        columns_basis, columns_factor = torch.linalg.qr(update.right)
        intended = (rows_basis.T @ update.left) @ columns_factor.T
        correction = intended.clone()
        before = math.inf
        for _ in range(FEEDBACK_ROUNDS):
            gap = abs((realised.gain or 0.0) - 1)
            if gap <= FEEDBACK_GAIN_ERROR or gap > _FEEDBACK_PROGRESS * before:
                break
            before = gap
            kept = torch.zeros_like(intended)
            for rows in row_pieces(aligned, update.rank):
                change = out[rows].float() - aligned[rows].float()
                kept += rows_basis[rows].T @ (change @ columns_basis)
            correction = correction + (intended - kept)
            corrected = Update(rows_basis @ correction, columns_basis)
            realised = _write(aligned, corrected, delta, nearest, out=out, target=update)
    return realised


def lox(
    base: Float[Tensor, "d_out d_in"],
    aligned: Float[Tensor, "d_out d_in"],
    rank: RankRule | int | str = 6,
    alpha: float = 1.25,
    *,
    dtype: torch.dtype | None = None,
    rounding: Rounding = "nearest",
    tolerance: float = DEFAULT_TOLERANCE,
    seed: int = 0,
) -> Float[Tensor, "d_out d_in"]:
    """W_align + alpha * Proj_k(W_align - W_base) for one matrix: LoX, Perin et al. 2025, Eq. 3.

    base, aligned: (d_out, d_in), any float dtype, same device; the delta is float32, subtracted in float64 where one of them is. Returns
    `dtype` (default: aligned's). rank: a number, or a rule or its text ('10%', 'energy:0.9', 'full', 'noise-floor'). Paper: rank 6,
    alpha 1.25 on Llama-2-7B. Raises NumericalError for NaN or Inf, RecipeError for alpha < 0 and settings that are none.
    """
    edited, _, _ = lox_edit(base, aligned, rank, check_alpha(alpha), dtype=dtype, rounding=rounding, tolerance=tolerance, seed=seed)
    return edited


def lox_edit(
    base: Float[Tensor, "d_out d_in"],
    aligned: Float[Tensor, "d_out d_in"],
    rank: RankRule | int | str = 6,
    alpha: float = 1.25,
    *,
    dtype: torch.dtype | None = None,
    rounding: Rounding = "nearest",
    tolerance: float = DEFAULT_TOLERANCE,
    seed: int = 0,
    rounding_seed: int | None = None,
    delta: Float[Tensor, "d_out d_in"] | None = None,
    subspace: Subspace | None = None,
    out: Float[Tensor, "d_out d_in"] | None = None,
    grid: Grid | None = None,
) -> tuple[Float[Tensor, "d_out d_in"], Subspace | None, Realised]:
    """As `lox`, with the subspace (None for rank 'full', which takes no SVD) and what survived rounding.

    delta: W_align - W_base in float32, and subspace: its leading triplets that `rank` keeps, where the caller has them already.
    rounding_seed: for stochastic rounding, default `seed`. out: where to write, and grid, as in `apply_update`. A zero delta gives aligned's values.
    """
    rule = rank_rule(rank)
    if delta is None:
        delta = float32_difference(aligned, base)
    if rule.kind == "full":
        subspace, update = None, full_rank_update(alpha)
    else:
        if subspace is None:
            edge = rounding_noise_edge(aligned) if rule.kind == "noise-floor" else 0.0
            subspace = truncated_svd(delta, rule, noise_edge=edge, tolerance=tolerance, seed=seed)
        update = lox_update(subspace, alpha)
    noise = seed if rounding_seed is None else rounding_seed
    edited, realised = apply_update(aligned, update, dtype=dtype, rounding=rounding, delta=delta, seed=noise, out=out, grid=grid)
    return edited, subspace, realised


# Controls: edits of the same Frobenius norm that do not follow the leading directions. Without them no claim about
# safety directions is honest ("Safety subspaces are not distinct", Ponkshe et al. 2025, sec. 4).


def random_directions_update(full: Subspace, rank: int, norm: float, *, seed: int) -> Update:
    """random-k: `rank` of the singular directions of the delta, drawn without replacement, scaled to Frobenius norm `norm`.

    full: a Subspace that holds every direction of the delta to draw from.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(full.rank, generator=generator)[:rank]
    values = full.singular_values[chosen]
    scaled = (values * (norm / float(values.norm()))).to(full.left)
    return Update(full.left[:, chosen] * scaled, full.right[:, chosen])


def random_subspace_update(delta: Float[Tensor, "d_out d_in"], rank: int, norm: float, *, seed: int) -> Update:
    """random: the delta projected on a Haar-random `rank`-dimensional output subspace, scaled to Frobenius norm `norm`.

    The QR factor of a (d_out, rank) Gaussian has the law of the leading left vectors of a Gaussian matrix, at a
    fraction of the cost of an SVD.
    """
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(delta.shape[0], rank, generator=generator)).Q.to(delta)
    right = (left.T @ delta).T
    return _scaled(left, right, norm)


def gaussian_update(shape: tuple[int, int], rank: int, norm: float, *, seed: int, device: torch.device | str = "cpu") -> Update:
    """Rank-`rank` Gaussian noise of Frobenius norm `norm`: nothing to do with the delta."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(shape[0], rank, generator=generator).to(device)
    right = torch.randn(shape[1], rank, generator=generator).to(device)
    return _scaled(left, right, norm)


def full_rank_update_of_norm(delta: Float[Tensor, "d_out d_in"], norm: float) -> Update:
    """full: the whole delta scaled to Frobenius norm `norm` (ExPO at the norm of a LoX edit)."""
    size = frobenius_norm(delta)
    return Update(None, None, norm / size if size else 0.0)


def _scaled(left: Tensor, right: Tensor, norm: float) -> Update:
    # ||L R^T||²_F = <L^T L, R^T R>: no dense product is formed.
    size = math.sqrt(float(((left.T @ left).double() * (right.T @ right).double()).sum()))
    return Update(left * (norm / size if size else 0.0), right)
