"""Triton kernels for what a product library does slowly on a GPU: a few rows times large matrices, and making a few rows orthonormal.

cuBLAS multiplies 8 rows with float32 matrices at a third to two thirds of the memory's speed; these read them as fast as it goes
(docs/gpu.md). Products are sums of TF32 products of the parts of each number ("3xTF32"), with the errors of float32.
Imported only where Triton is there; with TRITON_INTERPRET=1 the same code runs on a CPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a block as the matrix units take them; fewer are filled up with zeros.
LARGEST_WIDTH = 16
# Rows on the other side of `products_of_rows`: what a multiprocessor has room for.
LARGEST_HEIGHT = 64
# Steps through the summed side that a program takes at least: splitting that side further costs more than idle multiprocessors.
_FEWEST_STEPS = 8
# Sides of what a program reads at a time.
_SUMMED, _KEPT = 64, 128
# Columns that a program takes at a time for products of rows with rows, by how many rows there are on the other side; and how many a
# program takes in all, while there are no more than so many programs for a block: each waits for memory once per step.
_COLUMNS, _COLUMNS_OF_MANY = 256, 64
_COLUMNS_OF_A_PROGRAM, _MOST_PROGRAMS = 512, 32
# Shared memory of a block that a pipeline of three needs, by any release of Triton; consumer GPUs have 99 kB, and take one of two.
_NEEDED_FOR_THREE = 120_000


@triton.jit  # type: ignore[untyped-decorator]
def _rows_times(  # type: ignore[no-untyped-def]
    rows, address, out, first, summed, kept, width, SUMMED: tl.constexpr, KEPT: tl.constexpr, SPLITS: tl.constexpr, SWAPPED: tl.constexpr
):
    """out[b, s, w, j] = Σ_i rows[b, w, i] A[first + b, i, j] over the s-th part of i; A lies in memory as (i, j), or as (j, i) if SWAPPED."""
    batch, split = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row = tl.arange(0, 16)[:, None]
    j = tl.program_id(0) * KEPT + tl.arange(0, KEPT)
    rows += batch * width * summed
    matrix = tl.load(address).to(tl.pointer_type(tl.float32)) + (first + batch) * summed * kept
    total = tl.zeros((16, KEPT), tl.float32)
    steps = tl.cdiv(tl.cdiv(summed, SUMMED), SPLITS)
    for step in range(0, steps):
        i = (split * steps + step) * SUMMED + tl.arange(0, SUMMED)
        left = tl.load(rows + row * summed + i[None, :], mask=(row < width) & (i[None, :] < summed), other=0.0)
        if SWAPPED:
            place = tl.multiple_of(matrix, 16) + j[:, None].to(tl.int64) * summed + i[None, :]
            part = tl.trans(tl.load(place, mask=(j[:, None] < kept) & (i[None, :] < summed), other=0.0))
        else:
            place = tl.multiple_of(matrix, 16) + i[:, None].to(tl.int64) * kept + j[None, :]
            part = tl.load(place, mask=(i[:, None] < summed) & (j[None, :] < kept), other=0.0)
        total = tl.dot(left, part, total, input_precision="tf32x3")
    out += (batch * SPLITS + split) * width * kept
    tl.store(out + row * kept + j[None, :], total, mask=(row < width) & (j[None, :] < kept))


def rows_times(rows: Tensor, matrices: Tensor, out: Tensor, address: Tensor, first: int = 0) -> None:
    """out = rows @ matrices[first : first + b]. rows: (b, w, i), out: (b, w, j), contiguous float32, w ≤ 16. matrices: (n, i, j) float32,
    contiguous, or contiguous with their last two sides swapped; their shape and layout count, and not where they are: that is in
    `address`, (1,) int64 on the device, so that what is recorded once works for others. Same shapes, same kind of device: same bits.
    """
    count, width, summed = rows.shape
    kept = matrices.shape[2]
    blocks = triton.cdiv(kept, _KEPT)
    splits = _splits(blocks * count, triton.cdiv(summed, _SUMMED) // _FEWEST_STEPS, _multiprocessors(rows.device))
    parts = out if splits == 1 else torch.empty(count, splits, width, kept, device=out.device)
    swapped = matrices.stride(2) != 1
    _rows_times[(blocks, splits, count)](
        rows, address, parts, first, summed, kept, width, SUMMED=_SUMMED, KEPT=_KEPT, SPLITS=splits, SWAPPED=swapped, **options_for(rows.device)
    )
    if splits > 1:
        torch.sum(parts, dim=1, out=out)


@cache
def options_for(device: torch.device) -> dict[str, Any]:
    """How kernels are built for a device."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    room = getattr(properties, "shared_memory_per_block_optin", 0)
    return {"num_warps": 8, "num_stages": 3 if room >= _NEEDED_FOR_THREE else 2, "enable_fp_fusion": True}


@cache
def _splits(programs: int, most: int, multiprocessors: int) -> int:
    """Parts of the summed side with which the multiprocessors, which take a program at a time each, are idle least in the last round."""

    def busy(splits: int) -> float:
        rounds = -(-programs * splits // multiprocessors)
        return programs * splits / (rounds * multiprocessors)

    # Each part is also written and added up.
    return max(range(1, max(1, min(most, 8)) + 1), key=lambda splits: busy(splits) * (1 - 0.01 * splits))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit  # type: ignore[untyped-decorator]
def _products_of_rows(  # type: ignore[no-untyped-def]
    left, right, parts, width, height, columns, steps, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr
):
    """parts[b, s, i, j] = Σ_c left[b, i, c] right[b, j, c] over the s-th part of c, in float64."""
    batch, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, other = tl.arange(0, 16)[:, None], tl.arange(0, HEIGHT)
    left += batch * width * columns
    right += batch * height * columns
    total = tl.zeros((16, HEIGHT), tl.float64)
    for step in range(0, steps):
        place = (split * steps + step) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        one = tl.load(left + row * columns + place, mask=(row < width) & (place < columns), other=0.0).to(tl.float64)
        two = tl.load(right + other[:, None] * columns + place, mask=(other[:, None] < height) & (place < columns), other=0.0).to(tl.float64)
        total = tl.dot(one, tl.trans(two), total, out_dtype=tl.float64)
    parts += (batch * tl.num_programs(1) + split) * width * height
    tl.store(parts + row * height + other[None, :], total, mask=(row < width) & (other[None, :] < height))


def products_of_rows(rows: Tensor, others: Tensor) -> Tensor:
    """rows @ othersᵀ in float64, (b, w, r). rows: (b, w, n), others: (b, r, n), contiguous, float32 or float64, w ≤ 16, r ≤ 64."""
    return torch.sum(_parts_of_products(rows, others, _COLUMNS_OF_MANY), dim=1)


def _parts_of_products(rows: Tensor, others: Tensor, columns_at_a_time: int) -> Tensor:
    """(b, s, w, r), to be summed over s."""
    count, width, columns = rows.shape
    height = others.shape[1]
    steps, splits = _steps(columns, columns_at_a_time)
    parts = torch.empty(count, splits, width, height, dtype=torch.float64, device=rows.device)
    sides = {"HEIGHT": max(16, triton.next_power_of_2(height)), "COLUMNS": columns_at_a_time}
    _products_of_rows[(count, splits)](rows, others, parts, width, height, columns, steps, **sides, **options_for(rows.device))
    return parts


@cache
def _steps(columns: int, at_a_time: int) -> tuple[int, int]:
    """Steps of a program through its part of the columns, and how many parts there are."""
    steps = max(triton.cdiv(_COLUMNS_OF_A_PROGRAM, at_a_time), triton.cdiv(columns, at_a_time * _MOST_PROGRAMS))
    return steps, max(1, triton.cdiv(columns, at_a_time * steps))


@triton.jit  # type: ignore[untyped-decorator]
def _orthonormal(  # type: ignore[no-untyped-def]
    rows,
    parts,
    out,
    gram,
    lost,
    width,
    columns,
    steps,
    splits,
    CHECK: tl.constexpr,
    TOLERANCE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One round of Cholesky QR of rows[b] in float64 from the parts of its Gram matrix; see maths.block_qr. Each program factors that matrix
    and makes its part of the columns. What several programs write to `gram` and `lost` is the same."""
    batch, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    inside = (row < width) & (column < width)
    identity = (row == column).to(tl.float64)
    rows += batch * width * columns
    out += batch * width * columns
    part = tl.arange(0, PARTS)[:, None, None]
    places = (batch * splits + part) * width * width + row[None, :, :] * width + column[None, :, :]
    products = tl.sum(tl.load(parts + places, mask=(part < splits) & inside[None, :, :], other=0.0), 0)
    tl.store(gram + batch * width * width + row * width + column, products, mask=inside)
    # Rows that are not there are those of the identity, which stays as it is.
    left = tl.where(inside, products, identity)
    # NaN is not below either: `~(a <= b)`, not `a > b`.
    failed = tl.zeros((), tl.int32)
    if CHECK:
        failed = (~(tl.max(tl.max(tl.abs(left - identity), 1), 0) <= TOLERANCE)).to(tl.int32)
    inverse = identity
    # Elimination of the Gram matrix L Lᵀ, done to the identity as well: that becomes L⁻¹.
    for index in range(0, width):
        pivot = tl.sum(tl.sum(tl.where((row == index) & (column == index), left, 0.0), 1), 0)
        failed = failed | (~(pivot > 0)).to(tl.int32)
        scale = 1 / tl.sqrt(pivot)
        chosen_left = tl.sum(tl.where(row == index, left, 0.0), 0)[None, :] * scale
        chosen_inverse = tl.sum(tl.where(row == index, inverse, 0.0), 0)[None, :] * scale
        factor = tl.where(row > index, tl.sum(tl.where(column == index, left, 0.0), 1)[:, None] * scale, 0.0)
        left = left - factor * chosen_left
        inverse = tl.where(row == index, chosen_inverse, inverse - factor * chosen_inverse)
    # Also what was lost before; such rows become zeros, which spoil nothing.
    lost_now = tl.load(lost + batch).to(tl.int32) | failed
    tl.store(lost + batch, (lost_now != 0).to(tl.int8))
    for step in range(0, steps):
        place = (split * steps + step) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        mask = (row < width) & (place < columns)
        given = tl.load(rows + row * columns + place, mask=mask, other=0.0).to(tl.float64)
        product = tl.dot(inverse, given, out_dtype=tl.float64).to(tl.float32)
        tl.store(out + row * columns + place, tl.where(lost_now != 0, 0.0, product), mask=mask)


def orthonormal_rows(block: Tensor, lost: Tensor, nearly: float | None) -> tuple[Tensor, Tensor]:
    """As maths.block_qr.orthonormal_rows. nearly: how far Gram matrices may be from the identity; None for any. w ≤ 16."""
    count, width, columns = block.shape
    block = block.contiguous()
    out = torch.empty_like(block)
    gram = torch.empty(count, width, width, dtype=torch.float64, device=block.device)
    parts, (steps, splits) = _parts_of_products(block, block, _COLUMNS), _steps(columns, _COLUMNS)
    constants = {"CHECK": nearly is not None, "TOLERANCE": nearly or 0.0, "COLUMNS": _COLUMNS, "PARTS": triton.next_power_of_2(splits)}
    sizes = width, columns, steps, splits
    _orthonormal[(count, splits)](block, parts, out, gram, lost.view(torch.int8), *sizes, **constants, **options_for(block.device))
    return out, gram


def try_out(device: torch.device) -> None:
    """Builds and runs them once on small numbers. Raises what is in the way: an exception of Triton's, or RuntimeError for wrong results."""
    with torch.cuda.device(device):
        matrices = torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(0)).to(device)
        rows = matrices[:, :8, :24].contiguous()
        out = torch.empty(2, 8, 40, device=device)
        address = torch.tensor([matrices.data_ptr()], device=device)
        rows_times(rows, matrices, out, address)
        back = torch.empty(2, 8, 24, device=device)
        rows_times(out, matrices.mT, back, address)
        lost = torch.zeros(2, dtype=torch.bool, device=device)
        once, _ = orthonormal_rows(out, lost, None)
        twice, _ = orthonormal_rows(once, lost, 1.0)
        expected = rows.double() @ matrices.double()
        close = torch.allclose(out.double(), expected, atol=1e-4) and torch.allclose(back.double(), expected @ matrices.double().mT, atol=1e-3)
        identity = torch.eye(8, device=device).expand(2, 8, 8)
        if not close or bool(lost.any()) or not torch.allclose(twice @ twice.mT, identity, atol=1e-4):
            raise RuntimeError("they gave wrong results on this device")
