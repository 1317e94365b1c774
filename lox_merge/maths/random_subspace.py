"""What a random subspace would have given: laws in closed form where there is one, seeded draws, and bands of 95 %.

For a Haar-random k-dimensional subspace with basis Q of R^d and any M, E ||Q^T M||²/||M||² = k/d. Its variance follows from the
spectrum of M: with the unit vector e, ||Q^T e||² is Beta(k/2, (d-k)/2), and the d of them sum to k.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from scipy.special import betaincinv
from scipy.stats import t as student
from torch import Tensor

LEVEL = 0.95
Band = tuple[float, float]


def haar_basis(dimension: int, count: int, generator: torch.Generator) -> Float[Tensor, "d k"]:
    """Orthonormal basis (d, k), float32, of a Haar-random subspace: QR of a thin Gaussian matrix.

    The span of k Gaussian vectors is invariant under rotations, and so is that of the leading left singular vectors of a (d, n)
    Gaussian matrix: one law, without the SVD.
    """
    basis: Tensor = torch.linalg.qr(torch.randn(dimension, count, generator=generator)).Q
    return basis


def haar_energy(count: int, dimension: int, concentration: float) -> tuple[float, float]:
    """Mean and variance of ||Q^T M||²_F/||M||²_F for a Haar-random basis Q (d, k).

    concentration: Σ w_i² of the shares w_i = s_i²/Σ s² of M, 1 over its participation ratio: 1/d … 1. An upper bound of it gives
    an upper bound of the variance.
    """
    mean = count / dimension
    if dimension == 1 or count >= dimension:
        return mean, 0.0
    one = 2 * count * (dimension - count) / (dimension**2 * (dimension + 2))  # variance of a Beta(k/2, (d-k)/2)
    return mean, one * max(0.0, dimension * concentration - 1) / (dimension - 1)


def concentration_bound(squares: Float[Tensor, " j"], total: float, following: float | None) -> float:
    """Σ w_i² at most, from the leading squared singular values (descending); exact where they are all there are.

    following: the next singular value where it is known (0 where the spectrum ends).
    """
    if total == 0 or squares.numel() == 0:
        return 1.0
    shares = squares / max(total, float(squares.sum()))
    rest = max(0.0, 1 - float(shares.sum()))
    largest = float(shares[-1]) if following is None else min(float(shares[-1]), following**2 / total)
    # What is left weighs most where it is in as few directions as the next singular value allows.
    return min(1.0, float(shares.square().sum()) + rest * min(largest, rest))


def sampled_energy(shares: Float[Tensor, " s"], count: int) -> tuple[float, float]:
    """random-k: mean and variance of the sum of `count` of the shares, drawn without replacement.

    shares: (s,) energy of M in each singular direction of Δ_align, over ||M||²_F. Cochran 1977, Theorem 2.2.
    """
    size = shares.numel()
    mean = float(shares.mean())
    spread = float(shares.var(correction=1)) if size > 1 else 0.0
    return count * mean, count * (1 - count / size) * spread


def band(mean: float, variance: float) -> Band:
    """Central 95 % of a share in [0, 1] of this mean and variance, as a Beta law: exact for one Haar direction, else close."""
    if variance <= 0 or not 0 < mean < 1:
        return mean, mean
    size = mean * (1 - mean) / variance - 1
    if size <= 0:  # no such law: everything may happen
        return 0.0, 1.0
    tail = (1 - LEVEL) / 2
    return float(betaincinv(mean * size, (1 - mean) * size, tail)), float(betaincinv(mean * size, (1 - mean) * size, 1 - tail))


def band_of_draws(values: list[float]) -> tuple[float, Band | None]:
    """Mean of seeded draws and the interval that holds the next draw with 95 % (Student); None of fewer than two draws."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(student.ppf((1 + LEVEL) / 2, count - 1)) * deviation * math.sqrt(1 + 1 / count)
    return mean, (mean - half, mean + half)


def cosine_band(dimension: int) -> Band:
    """95 % of the cosine of two random directions of R^n: 0 ± 1.96/√n, from the exact Beta law of the squared cosine."""
    half = math.sqrt(float(betaincinv(0.5, (dimension - 1) / 2, LEVEL))) if dimension > 1 else 1.0
    return -half, half
