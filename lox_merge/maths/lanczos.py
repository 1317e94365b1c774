"""Block Golub-Kahan-Lanczos with full reorthogonalisation, an adaptive stop and thick restart.

A fixed number of power iterations fails silently exactly where alignment deltas are noisy (slow decay, a bulk of rounding
noise); a Krylov space with a residual test does not, at about the same cost. Method: Golub & Van Loan, ch. 10; thick
restart: Wu & Simon 2000; block start: Halko, Martinsson & Tropp 2011, alg. 4.5 and its discussion of block Krylov.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lox_merge.maths.rank import RankRule

# Wanted relative error of Proj_k(A) where the gap is at least 1 %. Writing bf16 loses far more (docs/numerics.md).
DEFAULT_TOLERANCE = 1e-3
# A random block of at least 8 vectors is not orthogonal to a wanted direction but with negligible probability. Blocks of 8 are
# 15 % faster at rank 6; from rank 9 on, blocks of 16 need fewer, better products (benchmarks/svd.py).
SMALL_BLOCK = 8
BLOCK = 16
# s_k/s_{k+1} below this: the span is not determined by the data, so no effort is spent on its angle.
SMALLEST_GAP = 1.01
# Restart near 160 basis vectors: reorthogonalisation then costs as much as the products with A (d = 4096).
BASIS = 160
# float32 products leave a residual of about this many eps * s_1 however long one iterates.
RESIDUAL_FLOOR = 32 * torch.finfo(torch.float32).eps
# On a CPU a matrix of more entries than this (8 MiB) is taken in panels of so many columns, each used for both products while it is in
# the cache: a third faster at 14336×4096, where memory is what limits (benchmarks/svd.py --panels).
_CACHED_ENTRIES = 2**21
_PANEL = 256
# Products with A Aᵀ are as large as the norm squared, and float32 ends at 3e38: from here on the Gram matrix, in float64, is safe.
LARGEST_NORM = 1e18
# With restarts a matrix that needs more products than this does not converge at all (all cases of FACTS need < 120).
LARGEST_PASSES = 400


@dataclass(frozen=True)
class Triplets:
    """left (d_out, k), singular_values (k,) float64 on the CPU, right (d_in, k); following: s_{k+1} if there is one."""

    left: Float[Tensor, "d_out k"]
    singular_values: Float[Tensor, " k"]
    right: Float[Tensor, "d_in k"]
    following: float | None
    passes: int


@dataclass(frozen=True)
class LanczosResult:
    triplets: Triplets
    converged: bool
    reason: str = ""  # 'stalled' or 'rank too large'


def residual_target(tolerance: float, leading: Sequence[float], following: float) -> float:
    """The residual eta = ||A V - U S||_F / s_k to reach for a relative error `tolerance` of Proj_k(A).

    From ||(P - P_hat) A||_F <= s_k eta sqrt(1 + r²)/(1 - r²), r = s_{k+1}/s_k, wherever s_k/s_{k+1} >= SMALLEST_GAP.
    leading: k singular values; following: s_{k+1}.
    """
    smallest, largest = leading[-1], leading[0]
    target = tolerance
    ratio = following / smallest
    if ratio < 1 / SMALLEST_GAP:
        target = min(target, tolerance * math.hypot(*leading) / smallest * (1 - ratio**2) / math.sqrt(1 + ratio**2))
    return max(target, RESIDUAL_FLOOR * largest / smallest)


def _orthonormal_rows(block: Tensor) -> Tensor:
    orthonormal: Tensor = torch.linalg.qr(block.T).Q
    return orthonormal.T.contiguous()


def _without(block: Tensor, basis: Tensor) -> Tensor:
    """`block` made orthogonal to the rows of `basis`; twice, because once leaves cancellation errors."""
    for _ in range(2):
        block = block - (block @ basis.T) @ basis
    return block


def _there_and_back(rows: Float[Tensor, "b short"], matrix: Float[Tensor, "short long"]) -> tuple[Float[Tensor, "b long"], Float[Tensor, "b short"]]:
    """rows · A and (rows · A) · Aᵀ."""
    if matrix.device.type != "cpu" or matrix.numel() <= _CACHED_ENTRIES:
        image = rows @ matrix
        return image, image @ matrix.T
    image = torch.empty(rows.shape[0], matrix.shape[1], dtype=rows.dtype)
    back = torch.zeros_like(rows)
    for panel, part in zip(torch.split(matrix, _PANEL, 1), torch.split(image, _PANEL, 1), strict=True):
        found = rows @ panel
        part.copy_(found)
        back.addmm_(found, panel.T)
    return image, back


def block_lanczos(
    matrix: Float[Tensor, "d_out d_in"],
    rule: RankRule,
    *,
    norm: float,
    noise_edge: float,
    tolerance: float,
    seed: int,
    largest_rank: int,
) -> LanczosResult:
    """Leading triplets of a float32 matrix by block Lanczos on its short side.

    The basis Q (rows, orthonormal) lives on the short side; Z = Q A on the long side; G = Z Z^T is kept in float64, so
    that squaring the singular values costs no accuracy. Ritz pairs of G give u = Q^T w, v = A^T u / s.
    Stops with reason 'rank too large' once the rule asks for more than `largest_rank` directions.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    short, long = min(matrix.shape), max(matrix.shape)
    device = matrix.device

    wide_matrix = matrix if wide else matrix.T
    fixed = rule.from_shape(short)
    width = SMALL_BLOCK if fixed is not None and fixed <= SMALL_BLOCK else BLOCK
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(width, long, generator=generator).to(device)
    block = _orthonormal_rows(start @ wide_matrix.T)
    passes = 1

    capacity = max(BASIS, 2 * fixed if fixed else 0)
    basis = torch.empty(capacity + width, short, device=device)
    images = torch.empty(capacity + width, long, dtype=torch.float64, device=device)
    gram = torch.zeros(capacity + width, capacity + width, dtype=torch.float64, device=device)
    size = 0
    stop_at = min(short, LARGEST_PASSES * width)
    while True:
        image, folded = _there_and_back(block, wide_matrix)
        basis[size : size + width] = block
        images[size : size + width] = image
        cross = images[: size + width] @ images[size : size + width].T
        gram[: size + width, size : size + width] = cross
        gram[size : size + width, : size + width] = cross.T
        size += width
        remainder = _without(folded, basis[:size])
        passes += 2

        squares, vectors = torch.linalg.eigh(gram[:size, :size].cpu())
        squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
        # Directions that are zero to working precision do not count towards the rank.
        meaningful = int((squares > squares[0] * RESIDUAL_FLOOR**2).sum())
        k = fixed if fixed is not None else rule.from_spectrum(squares[:meaningful], norm**2, noise_edge)
        exhausted = meaningful < size or size + width > short
        if meaningful < size:  # the spectrum is complete: there is nothing beyond it to wait for
            k = meaningful if k is None else min(k, meaningful)
        if k is not None and k > largest_rank:
            return LanczosResult(_triplets(basis[:size], images[:size], squares, vectors, 0, wide, passes), False, "rank too large")
        if k is not None and (k < meaningful or exhausted):
            # Rules that count directions must also have settled the first one that does not count.
            settled = max(1, k) if fixed is not None else min(k + 1, meaningful)
            values = squares[:settled].sqrt()
            coupling = (remainder.double() @ remainder.double().T).cpu()
            last = vectors[size - width : size, :settled]
            residual = ((last * (coupling @ last)).sum(0).clamp_min(0).sqrt() / values).norm() / values[-1]
            following = float(squares[settled].sqrt()) if settled < meaningful else 0.0
            if float(residual) <= residual_target(tolerance, values.tolist(), following):
                return LanczosResult(_triplets(basis[:size], images[:size], squares, vectors, k, wide, passes), True)
        if exhausted or passes >= LARGEST_PASSES or size >= stop_at:
            # Without an answer to how many directions are wanted, a larger space is needed, not more patience.
            reason = "rank too large" if k is None else "stalled"
            return LanczosResult(_triplets(basis[:size], images[:size], squares, vectors, 0, wide, passes), False, reason)
        # A second pass over the new block: where the remainder is nearly zero its directions are rounding, not orthogonal yet.
        block = _orthonormal_rows(_without(_orthonormal_rows(remainder), basis[:size]))
        if size + width > capacity:
            wanted = k if k is not None else size // 2
            if wanted + 2 * width > size // 2:  # the basis is too small for this rank: grow it
                capacity = min(2 * capacity, short)
                if capacity + width <= basis.shape[0]:
                    return LanczosResult(_triplets(basis[:size], images[:size], squares, vectors, 0, wide, passes), False, "rank too large")
                basis = _grown(basis, capacity + width)
                images = _grown(images, capacity + width)
                larger = torch.zeros(capacity + width, capacity + width, dtype=torch.float64, device=device)
                larger[:size, :size] = gram[:size, :size]
                gram = larger
            else:
                keep = wanted + 2 * width
                kept = vectors[:, :keep].to(device)
                basis[:keep] = kept.T.float() @ basis[:size]
                images[:keep] = kept.T @ images[:size]
                gram.zero_()
                gram[:keep, :keep] = images[:keep] @ images[:keep].T
                size = keep


def _grown(buffer: Tensor, rows: int) -> Tensor:
    larger = torch.empty(rows, buffer.shape[1], dtype=buffer.dtype, device=buffer.device)
    larger[: buffer.shape[0]] = buffer
    return larger


def _triplets(basis: Tensor, images: Tensor, squares: Tensor, vectors: Tensor, k: int, wide: bool, passes: int) -> Triplets:
    chosen = vectors[:, :k].to(basis.device)
    inner = (chosen.T.float() @ basis).T.contiguous() if k else basis.new_zeros(basis.shape[1], 0)
    rows = chosen.T @ images  # thin side first: ten times as fast as images.T @ chosen
    values = rows.norm(dim=1)
    outer = (rows / values[:, None]).float().T.contiguous()
    following = float(squares[k].sqrt()) if k < squares.numel() else None
    left, right = (inner, outer) if wide else (outer, inner)
    return Triplets(left, values.cpu(), right, following, passes)
