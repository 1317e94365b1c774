"""Orthonormal directions on one side of an alignment delta: its leading ones, some of them at random, or none of its own.

A projection needs the vectors of one side only. For a large share of the short side an iteration costs more than the dense
decomposition that it would approximate, so those ranks take the float64 Gram matrix, or the full SVD of a small matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lox_merge.errors import NumericalError
from lox_merge.maths.lanczos import DEFAULT_TOLERANCE, RESIDUAL_FLOOR
from lox_merge.maths.precision import frobenius_norm, full_precision_matmul
from lox_merge.maths.spectral import DENSE_SHARE, EXACT_SIDE, LARGEST_GRAM_SIDE, gram_matrix, outer_vectors, truncated_svd
from lox_merge.maths.subspace import Certificate, Side, Subspace

Basis = Literal["top", "random-k", "random"]
BASES: tuple[str, ...] = get_args(Basis)
Method = Literal["exact", "gram", "lanczos", "haar", "none"]


@dataclass(frozen=True)
class Directions:
    """vectors: (d, k) float32, orthonormal columns in the space of one side. method: what made them ('haar': drawn, not computed).

    certificate: how well the vectors of a decomposition are known; None for drawn ones.
    """

    vectors: Float[Tensor, "d k"]
    method: Method
    certificate: Certificate | None = None

    @property
    def rank(self) -> int:
        return int(self.vectors.shape[1])

    @property
    def dense(self) -> bool:
        """Whether a dense decomposition was taken."""
        return self.method in ("exact", "gram")


def rank_of_fraction(fraction: float, short_side: int) -> int:
    """k = max(1, round(f · min(d_out, d_in))), "Safety subspaces are not distinct" (Ponkshe et al. 2025), sec. 2."""
    return max(1, round(fraction * short_side))


def top_directions(
    delta: Float[Tensor, "d_out d_in"], rank: int, side: Side = "left", *, tolerance: float = DEFAULT_TOLERANCE, seed: int = 0
) -> Directions:
    """The `rank` leading singular vectors of `delta` on `side`; fewer where the others belong to singular values that are zero.

    delta: (d_out, d_in) float32. Raises NumericalError for NaN or Inf.
    """
    if not needs_dense(delta.shape[0], delta.shape[1], rank):
        return of_subspace(truncated_svd(delta, rank, tolerance=tolerance, seed=seed), side)
    return _dense(delta, side, lambda count: torch.arange(min(rank, count)))


def random_k_directions(delta: Float[Tensor, "d_out d_in"], rank: int, side: Side = "left", *, seed: int = 0) -> Directions:
    """random-k: `rank` of all singular vectors of `delta` on `side`, drawn without replacement; always a dense decomposition."""
    generator = torch.Generator().manual_seed(seed)
    return _dense(delta, side, lambda count: torch.randperm(count, generator=generator)[:rank].sort().values)


def random_directions(dimension: int, rank: int, *, seed: int = 0, device: torch.device | str = "cpu") -> Directions:
    """random: a Haar-random subspace. Q of a thin Gaussian spans one of the law of the leading vectors of a Gaussian matrix's
    SVD, at a fraction of the cost. Drawn on the CPU, so that every device gets the same."""
    generator = torch.Generator().manual_seed(seed)
    return Directions(torch.linalg.qr(torch.randn(dimension, min(rank, dimension), generator=generator)).Q.to(device), "haar")


def needs_dense(rows: int, columns: int, rank: int) -> bool:
    """Whether so many vectors of a matrix of this shape cost less by a dense decomposition."""
    short = min(rows, columns)
    return short > EXACT_SIDE and rank > DENSE_SHARE * short


def of_subspace(subspace: Subspace, side: Side) -> Directions:
    """One side of triplets that are there already. One memory layout: products of another layout add in another order."""
    vectors = subspace.left if side == "left" else subspace.right
    return Directions(vectors.contiguous(), subspace.certificate.method, subspace.certificate)


def _dense(delta: Tensor, side: Side, choose: Callable[[int], Tensor]) -> Directions:
    """The singular vectors of `side` whose positions `choose` returns for the number of directions that are not zero."""
    norm = frobenius_norm(delta)
    if not math.isfinite(norm):
        raise NumericalError(f"matrix of shape {tuple(delta.shape)} holds NaN or Inf entries")
    if norm == 0:
        return Directions(torch.zeros(delta.shape[0 if side == "left" else 1], 0, device=delta.device), "none")
    short = min(delta.shape)
    if short > LARGEST_GRAM_SIDE:
        raise NumericalError(
            f"a dense decomposition of a matrix of shape {tuple(delta.shape)} is wanted, whose short side is above {LARGEST_GRAM_SIDE}; "
            f"ask for a rank of at most {int(DENSE_SHARE * short)} and basis 'top'"
        )
    with full_precision_matmul(delta.device):
        if short <= EXACT_SIDE:
            left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
            chosen = choose(_count(values)).to(delta.device)
            vectors = (left[:, chosen] if side == "left" else right[chosen].T).float().contiguous()
            return Directions(vectors, "exact", _certificate("exact", values, chosen, 0.0))
        gram = gram_matrix(delta)
        squares, found = torch.linalg.eigh(gram)
        values = squares.flip(0).clamp_min(0).sqrt()
        chosen = choose(_count(values)).to(delta.device)
        inner = found.flip(1)[:, chosen]
        # ||G U - U S²|| / s_k²: the eigenvectors' own residual, a twentieth of the cost of finding them.
        residual = float((gram @ inner - inner * values[chosen].square()).norm() / values[chosen[-1]].square())
        inner_side = "left" if delta.shape[0] <= delta.shape[1] else "right"
        vectors = inner.float() if side == inner_side else outer_vectors(delta, inner)[0]
        return Directions(vectors.contiguous(), "gram", _certificate("gram", values, chosen, residual))


def _count(values: Tensor) -> int:
    """Directions that are not zero to float32 working precision, as in truncated_svd."""
    return int((values > float(values[0]) * RESIDUAL_FLOOR).sum())


def _certificate(method: Literal["exact", "gram"], values: Tensor, chosen: Tensor, residual: float) -> Certificate | None:
    """Of leading vectors; drawn ones among all have no k-th and (k+1)-th value to tell apart."""
    k = chosen.numel()
    if k and int(chosen[-1]) != k - 1:
        return None
    following = float(values[k]) if k < values.numel() else None
    return Certificate(method, residual, float(values[k - 1]), following, 2)
