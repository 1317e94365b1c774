"""Points of a model's neighbourhood, where another model lies in a plane of weights, and VISAGE.

Peng et al. 2024, "Navigating the safety landscape", arXiv 2405.17374.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy
import torch
from jaxtyping import Float
from torch import Tensor

from lox_merge.maths.pieces import entries_at_once

# Numbers drawn at a time: their float32 copy stays in a core's cache.
_DRAWN = 2**18
# Of a difference's length: far above what float64 sums leave, far below what a picture shows.
_ROUNDING = 1e-12


def gaussian_noise(shape: Sequence[int], name: str, seed: int) -> Tensor:
    """Independent standard normal numbers of one tensor, float16, made on the CPU.

    They depend on seed, name and shape alone. float16 is part of their definition (10 bits of a number nobody wrote down): what
    is kept in memory and what is drawn again are the same, at half the memory.
    """
    generator = numpy.random.Generator(numpy.random.SFC64([seed % 2**64, zlib.crc32(name.encode())]))
    out = torch.empty(tuple(shape), dtype=torch.float16)
    flat = out.view(-1)
    for start in range(0, flat.numel(), _DRAWN):
        piece = flat[start : start + _DRAWN]
        piece.copy_(torch.from_numpy(generator.standard_normal(piece.numel(), dtype=numpy.float32)))
    return out


def gaussian_bytes(shape: Sequence[int]) -> int:
    """Memory of `gaussian_noise` of that shape."""
    return torch.float16.itemsize * torch.Size(shape).numel()


def euclidean_norm(values: Float[Tensor, "*shape"], minus: Float[Tensor, "*shape"] | None = None) -> float:
    """‖values‖ or ‖values - minus‖, any shape and dtype: differences in float32 at least, squares summed in float64."""
    flat, total = values.reshape(-1), 0.0
    other = None if minus is None else minus.reshape(-1)
    for start in range(0, flat.numel(), _DRAWN):
        piece = _wide(flat[start : start + _DRAWN])
        if other is not None:
            piece = piece - _wide(other[start : start + _DRAWN])
        total += float(torch.linalg.vector_norm(piece, dtype=torch.float64).square())
    return float(numpy.sqrt(total))


def write_point(
    out: Float[Tensor, "*shape"],
    anchor: Float[Tensor, "*shape"],
    others: Sequence[tuple[float, Float[Tensor, "*shape"]]],
    noises: Sequence[tuple[float, Float[Tensor, "*shape"]]],
) -> None:
    """out = anchor + Σ c (other - anchor) + Σ s noise, in float32 (float64 of float64), rounded once to the dtype of `out`.

    others: c and a model's tensor; noises: s and a tensor of noise; all of one shape, on any device. A point that is one of the
    models (every coefficient 0, or a single one of 1) has that tensor's own values: no sum is taken.
    """
    steps = [(factor, other) for factor, other in others if factor]
    moves = [(factor, noise) for factor, noise in noises if factor]
    if not moves and (not steps or (len(steps) == 1 and steps[0][0] == 1)):
        out.copy_(steps[0][1] if steps else anchor)
        return
    whole = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    target, first = whole.view(-1), anchor.reshape(-1)
    step_size = entries_at_once(out.device)
    flat_steps = [(factor, other.reshape(-1)) for factor, other in steps]
    flat_moves = [(factor, noise.reshape(-1)) for factor, noise in moves]
    for start in range(0, target.numel(), step_size):
        piece = slice(start, start + step_size)
        begin = _wide(first[piece].to(out.device))
        total = begin.clone() if begin.data_ptr() == first[piece].data_ptr() else begin
        begin = begin if not flat_steps else total.clone()
        for factor, values in flat_steps:
            total.add_(_wide(values[piece].to(out.device)).to(total.dtype) - begin, alpha=factor)
        for factor, values in flat_moves:
            total.add_(values[piece].to(device=out.device, dtype=total.dtype), alpha=factor)
        target[piece].copy_(total)
    if whole is not out:
        out.copy_(whole)


def plane_coordinates(gram: Float[Tensor, "*shape"], products: Float[Tensor, " k"], square: float) -> tuple[tuple[float, ...], float, float | None]:
    """Where a model lies in the plane of directions d: coordinates by least squares, its distance from the plane, and that as a share.

    gram: ⟨d_i, d_j⟩; products: ⟨d_i, x⟩ for x = θ - θ₁; square: ‖x‖²; float64. The share is of ‖x‖, None where x = 0. Directions
    that do not differ (a gram without full rank) give the shortest coordinates.
    """
    found = torch.linalg.lstsq(gram.double(), products.double()[:, None], driver="gelsd").solution[:, 0]
    # ‖x - Dc‖² by expanding it; rounding may take it below zero where x lies in the plane.
    left = max(0.0, square - 2 * float(found @ products.double()) + float(found @ gram.double() @ found))
    distance = left**0.5
    # A model that is one of the directions has exact zeros beside it, not what rounding leaves of them.
    noise = _ROUNDING * square**0.5
    lengths = gram.double().diagonal().clamp(min=0).sqrt()
    found = torch.where(found.abs() * lengths > noise, found, 0.0)
    return tuple(found.tolist()), distance, distance / square**0.5 if square else None


def visage(rates: Sequence[float | None]) -> float | None:
    """VISAGE: mean of 100 - ASR (in %) over the points whose ASR is below 100 %; in [0, 100], None without such a point.

    rates: ASR in [0, 1] of the sampled points, None where undefined (left out). Peng et al. 2024, sec. 4. The authors' program takes
    the stretch of points between the last ones of 100 % on both sides; the two differ where a point of 100 % lies inside.
    """
    kept = [100 * (1 - rate) for rate in rates if rate is not None and rate < 1]
    return sum(kept) / len(kept) if kept else None


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
