"""Truncated SVD of many matrices of one shape, with the certificates of maths.spectral."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from lox_merge.maths.batched_lanczos import Run, basis_rows, batched_lanczos, block_width
from lox_merge.maths.lanczos import DEFAULT_TOLERANCE, LARGEST_NORM
from lox_merge.maths.precision import full_precision_matmul
from lox_merge.maths.rank import RankRule
from lox_merge.maths.spectral import DENSE_SHARE, EXACT_SIDE, truncated_svd
from lox_merge.maths.subspace import Certificate, Subspace, empty_subspace
from lox_merge.maths.thin_products import here

# A basis for a larger rank, in float64 on the long side, takes more memory than the matrices, and its eigenproblems more time.
LARGEST_RANK = 128


def batched_rank(shape: tuple[int, int], rule: RankRule) -> int | None:
    """k where matrices of this shape are decomposed together; None where the rule or the shape needs another method."""
    short = min(shape)
    if rule.kind not in ("fixed", "percent") or short <= EXACT_SIDE:
        return None
    k = rule.from_shape(short)
    return k if k is not None and k <= min(LARGEST_RANK, DENSE_SHARE * short) else None


def batched_memory(shape: tuple[int, int], rank: int) -> int:
    """Upper estimate of the bytes that one matrix of a batch takes beside itself."""
    short, long = sorted(shape)
    rows, width = basis_rows(rank), block_width(rank)
    # Twice: a restart makes the kept part anew before it replaces the old; blocks and their float64 copies beside.
    return rows * (4 * short + 8 * long) * 2 + 8 * rows * rows + 64 * width * (short + long)


def batched_truncated_svd(
    matrices: Float[Tensor, "b d_out d_in"],
    rule: RankRule,
    *,
    norms: Sequence[float],
    tolerance: float = DEFAULT_TOLERANCE,
    seed: int = 0,
    run: Run = map,
) -> list[Subspace]:
    """As truncated_svd of each matrix: leading triplets and a certificate, within the same tolerance, not to the same bit.

    matrices: (b, d_out, d_in) float32, finite, not changed. norms: their Frobenius norms; a matrix whose norm is 0 has rank 0.
    rule: one for which `batched_rank` gives a number. run: shares the host's part out among threads. Raises NumericalError.
    """
    rank = batched_rank((matrices.shape[1], matrices.shape[2]), rule)
    if rank is None:
        raise ValueError(f"rank rule {rule} does not go in a batch of shape {tuple(matrices.shape)}")
    chosen = [index for index, norm in enumerate(norms) if 0 < norm < LARGEST_NORM]
    with full_precision_matmul(matrices.device), here(matrices.device):
        certified = _certified(matrices, rank, norms, chosen, tolerance, seed, run)
    results = []
    for index, norm in enumerate(norms):
        if not norm:
            results.append(empty_subspace(matrices[index], norm))
        elif index in certified:
            results.append(certified[index])
        else:
            results.append(truncated_svd(matrices[index], rule, tolerance=tolerance, seed=seed))
    return results


def _certified(
    matrices: Tensor, rank: int, norms: Sequence[float], chosen: Sequence[int], tolerance: float, seed: int, run: Run
) -> dict[int, Subspace]:
    found = batched_lanczos(matrices, rank, chosen=chosen, tolerance=tolerance, seed=seed, run=run)
    wide = matrices.shape[1] <= matrices.shape[2]
    subspaces = {}
    for index, one in found.items():
        triplets = one.triplets
        smallest = float(triplets.values[-1])
        certificate = Certificate("lanczos", triplets.residual / smallest, smallest, one.following, one.passes)
        left, right = (triplets.inner, triplets.outer) if wide else (triplets.outer, triplets.inner)
        subspaces[index] = Subspace(left, triplets.values, right, norms[index], certificate)
    return subspaces
