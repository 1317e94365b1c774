"""The values that a quantised matrix can hold: a scale for each block times what a code can be.

w = scale · (code − zero). Decoding is exact but for one float32 product; rounding onto the grid keeps the scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lox_merge.maths.pieces import row_pieces
from lox_merge.maths.precision import powers_of_two
from lox_merge.maths.rounding import Rounding


@runtime_checkable
class Codes(Protocol):
    """What codes can be, as float32 numbers."""

    def nearest(self, values: Tensor) -> Tensor:
        """The nearest code of each value, ties to even; the largest one beyond it."""
        ...

    def stochastic(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """One of the two codes around each value, so that the mean over draws is the value."""
        ...

    def variance(self, codes: Tensor) -> Tensor:
        """Variance of what was rounded to each of the codes, from the code: uniform between the borders to its neighbours."""
        ...


@dataclass(frozen=True)
class FloatCodes:
    """The finite numbers of a float8 dtype of torch."""

    dtype: torch.dtype

    def nearest(self, values: Tensor) -> Tensor:
        largest = torch.finfo(self.dtype).max
        # Beyond the largest number the conversion gives NaN, not the largest number.
        return values.clamp(-largest, largest).to(self.dtype).float()

    def stochastic(self, values: Tensor, generator: torch.Generator) -> Tensor:
        information, spacing = torch.finfo(self.dtype), self._spacing(values)
        drawn = torch.rand(values.shape, generator=generator, device=values.device)
        return ((values / spacing + drawn).floor() * spacing).clamp(-information.max, information.max)

    def variance(self, codes: Tensor) -> Tensor:
        power, steps = powers_of_two(codes.contiguous()), self._spacing(codes)
        # The neighbour below a power of two is half as far away: (s³/64 + s³/8) / (9s/4), where others have s²/12.
        narrow = (codes.abs() == power) & (power > torch.finfo(self.dtype).tiny)
        return steps.square() / torch.where(narrow, 16.0, 12.0)

    def _spacing(self, values: Tensor) -> Tensor:
        information = torch.finfo(self.dtype)
        # Below the smallest normal number it stays what it is there.
        return powers_of_two(values.contiguous()).clamp_min_(information.tiny) * information.eps


@dataclass(frozen=True)
class WholeCodes:
    """Whole numbers of `bits` bits with a sign."""

    bits: int

    def nearest(self, values: Tensor) -> Tensor:
        return values.round().clamp(self.smallest, self.largest)

    def stochastic(self, values: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.rand(values.shape, generator=generator, device=values.device)
        return (values + drawn).floor().clamp(self.smallest, self.largest)

    def variance(self, codes: Tensor) -> Tensor:
        return torch.full_like(codes, 1 / 12)

    @property
    def smallest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def largest(self) -> int:
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class Grid:
    """A grid for a matrix of (rows, columns): entry (i, j) has scales[row_block[i], column_block[j]], and zeros likewise.

    scales, zeros: (r, c) float32; zeros None where codes are taken as they are.
    """

    codes: Codes
    scales: Float[Tensor, "r c"]
    zeros: Float[Tensor, "r c"] | None
    row_block: Int[Tensor, " rows"]
    column_block: Int[Tensor, " columns"]

    @classmethod
    def of_blocks(cls, codes: Codes, scales: Tensor, zeros: Tensor | None, shape: tuple[int, int], block: tuple[int, int]) -> Grid:
        """For blocks of `block` rows and columns; the last ones may be smaller."""
        rows, columns = (torch.arange(side) // size for side, size in zip(shape, block, strict=True))
        return cls(codes, scales.float(), None if zeros is None else zeros.float(), rows, columns)

    def part(self, rows: slice, columns: slice) -> Grid:
        return replace(self, row_block=self.row_block[rows], column_block=self.column_block[columns])

    def to(self, device: torch.device) -> Grid:
        zeros = None if self.zeros is None else self.zeros.to(device)
        return Grid(self.codes, self.scales.to(device), zeros, self.row_block.to(device), self.column_block.to(device))

    def decode(self, codes: Tensor) -> Float[Tensor, "rows columns"]:
        """The values of codes (rows, columns) of any dtype, float32."""
        out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for rows in row_pieces(codes):
            out[rows] = self._value(codes[rows].float(), rows)
        return out

    def encode(self, values: Float[Tensor, "rows columns"], rows: slice = slice(None)) -> Float[Tensor, "rows columns"]:
        """The nearest codes of values of these rows, as float32 numbers."""
        return self.codes.nearest(self._position(values, rows))

    def round(self, values: Tensor, rows: slice, rounding: Rounding = "nearest", generator: torch.Generator | None = None) -> Tensor:
        """float32 `values` of these rows, moved to values of the grid. 'stochastic' needs the generator."""
        if rounding != "stochastic":
            return self._value(self.encode(values, rows), rows)
        assert generator is not None
        return self._value(self.codes.stochastic(self._position(values, rows), generator), rows)

    def rounding_variance(self, values: Float[Tensor, "rows columns"]) -> tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]:
        """Sums over the rows and over the columns of a matrix on the grid, float64, of the variance of what rounding to nearest changed."""
        by_row = torch.empty(values.shape[0], dtype=torch.float64, device=values.device)
        by_column = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
        for rows in row_pieces(values):
            found = self.codes.variance(self.encode(values[rows], rows)) * self._expand(self.scales, rows).square()
            by_row[rows] = found.sum(1).double()
            by_column += found.sum(0).double()
        return by_row, by_column

    def _position(self, values: Tensor, rows: slice) -> Tensor:
        """Where values are between codes."""
        scales = self._expand(self.scales, rows)
        # A block of zeros may have the scale 0; nothing but 0 can be written there.
        found = torch.where(scales != 0, values / scales, torch.zeros((), device=values.device))
        return found if self.zeros is None else found + self._expand(self.zeros, rows)

    def _value(self, codes: Tensor, rows: slice) -> Tensor:
        if self.zeros is not None:
            codes = codes - self._expand(self.zeros, rows)
        return codes * self._expand(self.scales, rows)

    def _expand(self, table: Tensor, rows: slice) -> Tensor:
        return table[self.row_block[rows]][:, self.column_block]


def fresh_scales(values: Float[Tensor, "rows columns"], block: tuple[int, int], largest: float) -> Float[Tensor, "r c"]:
    """The scales that put the largest entry of each block at `largest`: how these formats choose them. For comparison in benchmarks."""
    rows, columns = values.shape
    padded = torch.nn.functional.pad(values.abs(), (0, -columns % block[1], 0, -rows % block[0]))
    high, wide = math.ceil(rows / block[0]), math.ceil(columns / block[1])
    return padded.view(high, block[0], wide, block[1]).amax((1, 3)).clamp_min(1e-12) / largest
