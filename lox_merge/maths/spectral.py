"""Truncated SVD of one matrix with a certificate: exact for small sides, block Lanczos, or a float64 Gram matrix."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from lox_merge.errors import LoxMergeWarning, NumericalError
from lox_merge.maths.lanczos import DEFAULT_TOLERANCE, LARGEST_NORM, RESIDUAL_FLOOR, Triplets, block_lanczos
from lox_merge.maths.precision import frobenius_norm_here, full_precision_matmul
from lox_merge.maths.rank import RankRule, rank_rule
from lox_merge.maths.subspace import Certificate, Subspace, empty_subspace

# Below this short side a float64 SVD costs less than the bookkeeping of a Krylov space (measured in benchmarks/svd.py).
EXACT_SIDE = 128
# Above this share of the short side a Krylov basis costs more than the Gram matrix it would approximate.
DENSE_SHARE = 0.2
# float64 eigenvectors of a Gram matrix this large take 2 GiB and, on a CPU, minutes; beyond it there is no dense path.
LARGEST_GRAM_SIDE = 16384


def truncated_svd(
    matrix: Float[Tensor, "d_out d_in"],
    rank: RankRule | int | str,
    *,
    noise_edge: float = 0.0,
    tolerance: float = DEFAULT_TOLERANCE,
    seed: int = 0,
) -> Subspace:
    """Leading singular triplets of `matrix` and a certificate of their accuracy.

    matrix: (d_out, d_in) float32 on any device; computed on in place of a copy, never changed.
    rank: how many, or a rule, or its text; directions whose singular value is zero to working precision are dropped, so Subspace.rank may be less.
    noise_edge: for the rule 'noise-floor', the largest singular value that rounding noise alone would give.
    tolerance: wanted relative Frobenius error of Proj_k(matrix) where s_k/s_{k+1} >= 1.01; below that gap the span is
        ill-posed and the tolerance applies to the residual alone.
    Raises NumericalError for NaN or Inf, and when nothing converges, RecipeError for no rank. Same seed, same device: same bits.
    Equivalent: numpy.linalg.svd(matrix)[:, :k] up to the sign of each pair of vectors.
    """
    rule = rank_rule(rank)
    short = min(matrix.shape)
    norm = float(frobenius_norm_here(matrix))
    if not norm < float("inf"):
        bad = int((~torch.isfinite(matrix)).sum())
        raise NumericalError(f"matrix of shape {tuple(matrix.shape)} holds {bad:,} NaN or Inf entries") if bad else too_large(matrix)
    if norm == 0 or short == 0:
        return empty_subspace(matrix, norm)
    values = matrix if matrix.dtype == torch.float32 else matrix.float()
    with full_precision_matmul(values.device):
        triplets, method = _solve(values, rule, norm, noise_edge, tolerance, seed)
        return _certify(values, triplets, method, norm)


def too_large(matrix: Float[Tensor, "d_out d_in"]) -> NumericalError:
    """The error for a matrix of finite entries whose norm is none in float32."""
    return NumericalError(
        f"a difference of weights of shape {tuple(matrix.shape)} has entries up to {float(matrix.abs().max()):.1e}: finite, but the sum of "
        "their squares overflows float32, in which it would be decomposed. One of the checkpoints is likely damaged; leave the tensor out "
        "with --exclude, or repair it"
    )


def _solve(matrix: Tensor, rule: RankRule, norm: float, noise_edge: float, tolerance: float, seed: int) -> tuple[Triplets, str]:
    short = min(matrix.shape)
    if short <= EXACT_SIDE:
        return _exact(matrix, rule, norm, noise_edge), "exact"
    wanted = rule.from_shape(short)
    if norm < LARGEST_NORM and (wanted is None or wanted <= DENSE_SHARE * short):
        found = block_lanczos(matrix, rule, norm=norm, noise_edge=noise_edge, tolerance=tolerance, seed=seed, largest_rank=int(DENSE_SHARE * short))
        if found.converged:
            return found.triplets, "lanczos"
        if found.reason == "stalled":
            warnings.warn(
                f"block Lanczos did not converge on a matrix of shape {tuple(matrix.shape)} after {found.triplets.passes} passes; "
                "a float64 Gram eigendecomposition was used instead (slower, exact)",
                LoxMergeWarning,
                stacklevel=4,
            )
    if short > LARGEST_GRAM_SIDE:
        raise NumericalError(
            f"rank rule {rule} needs a dense decomposition of a matrix of shape {tuple(matrix.shape)}, whose short side is above "
            f"{LARGEST_GRAM_SIDE}; ask for a fixed rank of at most {int(DENSE_SHARE * short)}"
        )
    return _gram(matrix, rule, norm, noise_edge), "gram"


def _pick(rule: RankRule, singular_values: Tensor, norm: float, noise_edge: float) -> int:
    """The rule's rank on a complete spectrum, without directions that are zero to float32 working precision."""
    short = singular_values.numel()
    wanted = rule.from_shape(short)
    if wanted is None:
        wanted = rule.from_spectrum(singular_values.square(), norm**2, noise_edge)
        wanted = short if wanted is None else wanted
    floor = float(singular_values[0]) * RESIDUAL_FLOOR
    return min(wanted, int((singular_values > floor).sum()))


def _exact(matrix: Tensor, rule: RankRule, norm: float, noise_edge: float) -> Triplets:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values.cpu()
    k = _pick(rule, values, norm, noise_edge)
    following = float(values[k]) if k < values.numel() else None
    return Triplets(left[:, :k].float(), values[:k], right[:k].T.float(), following, passes=2)


def _gram(matrix: Tensor, rule: RankRule, norm: float, noise_edge: float) -> Triplets:
    """Eigenvectors of the float64 Gram matrix of the short side. Squares the condition number: s_i below 1e-8 s_1 are lost,
    which float32 input does not define anyway."""
    wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(gram_matrix(matrix))
    values = squares.flip(0).clamp_min(0).sqrt().cpu()
    k = _pick(rule, values, norm, noise_edge)
    inner = vectors.flip(1)[:, :k]
    outer, values_k = outer_vectors(matrix, inner)
    following = float(values[k]) if k < values.numel() else None
    left, right = (inner.float(), outer) if wide else (outer, inner.float())
    return Triplets(left, values_k.cpu(), right, following, passes=2)


def gram_matrix(matrix: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "short short"]:
    """A A^T or A^T A, whichever is smaller, in float64."""
    wide = matrix.shape[0] <= matrix.shape[1]
    short, long = min(matrix.shape), max(matrix.shape)
    gram = torch.zeros(short, short, dtype=torch.float64, device=matrix.device)
    for start in range(0, long, _step(short)):
        columns = slice(start, start + _step(short))
        part = (matrix[:, columns] if wide else matrix[columns].T).double()
        gram.addmm_(part, part.T)
    return gram


def outer_vectors(matrix: Float[Tensor, "d_out d_in"], inner: Float[Tensor, "short k"]) -> tuple[Float[Tensor, "long k"], Float[Tensor, " k"]]:
    """Singular vectors of the long side in float32 from those of the short one (float64), and the singular values."""
    wide = matrix.shape[0] <= matrix.shape[1]
    short, long = min(matrix.shape), max(matrix.shape)
    outer = torch.empty(long, inner.shape[1], dtype=torch.float64, device=matrix.device)
    for start in range(0, long, _step(short)):
        rows = slice(start, start + _step(short))
        part = (matrix[:, rows].T if wide else matrix[rows]).double()
        outer[rows] = part @ inner
    # The norms of A^T u are better than the square roots of eigenvalues for small values.
    values = outer.norm(dim=0)
    return (outer / values).float(), values


def _step(short: int) -> int:
    return max(1, 2**24 // short)  # 128 MiB of float64 at a time, whatever the long side


def _certify(matrix: Tensor, triplets: Triplets, method: str, norm: float) -> Subspace:
    k = triplets.singular_values.numel()
    if k == 0:
        return empty_subspace(matrix, norm, triplets.following)
    smallest = float(triplets.singular_values[-1])
    scaled = triplets.singular_values.to(device=matrix.device, dtype=torch.float32)
    # The recurrences make one of the two residuals vanish by construction; the other one is the evidence.
    if matrix.shape[0] <= matrix.shape[1]:
        # (k, long) times a matrix: the thin side first, which is three times as fast as the other way round.
        difference = (triplets.right.T @ matrix.T).T - triplets.left * scaled
    else:
        difference = (triplets.left.T @ matrix).T - triplets.right * scaled
    residual = float(difference.double().norm()) / smallest
    certificate = Certificate(method, residual, smallest, triplets.following, triplets.passes + 1)  # type: ignore[arg-type]
    return Subspace(triplets.left, triplets.singular_values, triplets.right, norm, certificate)
