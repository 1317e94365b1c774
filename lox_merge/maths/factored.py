"""Exact SVD of a matrix that is given as two thin factors: what a low-rank adapter adds to a weight."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lox_merge.errors import NumericalError
from lox_merge.maths.lanczos import RESIDUAL_FLOOR
from lox_merge.maths.rank import RankRule
from lox_merge.maths.subspace import Certificate, Subspace


def factored_svd(left: Float[Tensor, "d_out r"], right: Float[Tensor, "d_in r"], rank: RankRule | int, *, noise_edge: float = 0.0) -> Subspace:
    """Singular triplets of left @ right.T, which is never formed: QR of both factors, then the SVD of an r×r core, in float64.

    rank: how many; a matrix of rank r has at most r, and directions that are zero to working precision are dropped.
    noise_edge: as in `truncated_svd`. The certificate's method is 'exact'. Raises NumericalError for NaN or Inf.
    Equivalent: numpy.linalg.svd(left @ right.T)[:, :k] up to the sign of each pair of vectors.
    """
    rule = RankRule("fixed", rank) if isinstance(rank, int) else rank
    if not (bool(torch.isfinite(left).all()) and bool(torch.isfinite(right).all())):
        raise NumericalError(f"the factors {tuple(left.shape)} and {tuple(right.shape)} hold NaN or Inf")
    left_basis, left_core = torch.linalg.qr(left.double())
    right_basis, right_core = torch.linalg.qr(right.double())
    inner, values, outer = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    values = values.cpu()
    norm = float(values.norm())
    short = min(left.shape[0], right.shape[0])
    wanted = rule.from_shape(short)
    if wanted is None:
        wanted = rule.from_spectrum(values.square(), norm**2, noise_edge)
    floor = float(values[0]) * RESIDUAL_FLOOR if values.numel() else 0.0
    k = min(values.numel() if wanted is None else wanted, int((values > floor).sum()))
    kept = (left_basis @ inner[:, :k]).float(), values[:k], (right_basis @ outer[:k].T).float()
    smallest = float(values[k - 1]) if k else 0.0
    following = float(values[k]) if k < values.numel() else None
    residual = 0.0
    if k:
        difference = left.double() @ (right.double().T @ kept[2].double()) - kept[0].double() * kept[1].to(left.device)
        residual = float(difference.norm()) / smallest
    return Subspace(*kept, norm, Certificate("exact" if k else "none", residual, smallest, following, 0))
