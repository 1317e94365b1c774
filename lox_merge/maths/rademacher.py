"""Overlap scores after a Rademacher projection to k dimensions, as the paper estimates them (sec. 7), and how noisy that is.

R (k, n) has entries ±1/√k. ⟨R g, R ΔW⟩ is unbiased for ⟨g, ΔW⟩, but its square is not unbiased for ⟨g, ΔW⟩²: it is larger by
(||g||²||ΔW||² + ⟨g, ΔW⟩² − 2 Σ_a g_a² ΔW_a²)/k on average, and that noise outgrows the score where the angle's cosine is below 1/√k.
The rows of R are independent draws, so their U-statistic takes the noise's mean away.
"""

from __future__ import annotations

import zlib

import numpy
import torch
from jaxtyping import Float
from torch import Tensor


def signs(dimensions: int, columns: int, name: str, row: int, seed: int) -> Float[Tensor, "k columns"]:
    """(k, columns) float32 of ±1: the part of R for one row of one parameter, the same on every machine."""
    generator = numpy.random.default_rng([seed, zlib.crc32(name.encode()), row])
    bits = numpy.unpackbits(numpy.frombuffer(generator.bytes((dimensions * columns + 7) // 8), dtype=numpy.uint8))
    return torch.from_numpy(bits[: dimensions * columns].reshape(dimensions, columns)).float().mul_(2).sub_(1)


def add_projection(out: Float[Tensor, "b k"], rows: Float[Tensor, "b rows columns"], name: str, first: int, seed: int) -> None:
    """out += rows `first`, … of b matrices times the signs for them; divide by √k at the end."""
    for place in range(rows.shape[1]):
        part = signs(out.shape[1], rows.shape[2], name, first + place, seed).to(device=rows.device, dtype=rows.dtype)
        out += (rows[:, place] @ part.T).to(out.dtype)


def projected_scores(gradients: Float[Tensor, "n k"], update: Float[Tensor, " k"]) -> tuple[float, float]:
    """(the paper's OS, the unbiased one) from sums of signs: R √k times g_i, and times ΔW.

    The second one is (1/N) Σ_i [(Σ_l z_il)² − Σ_l z_il²]/(k (k − 1)) with z_il one dimension's own estimate of ⟨g_i, ΔW⟩; it may be
    below zero where noise is all there is.
    """
    estimates = gradients.double() * update.double()
    count = estimates.shape[1]
    sums, squares = estimates.sum(1), estimates.square().sum(1)
    plain = float((sums / count).square().mean())
    return plain, float(((sums.square() - squares) / (count * (count - 1))).mean())
