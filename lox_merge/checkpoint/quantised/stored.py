"""One quantised tensor as its checkpoint stores it: codes, scales, zero points, and how codes lie in the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lox_merge.checkpoint.safetensors_format import TensorInfo
from lox_merge.errors import CheckpointFormatError
from lox_merge.maths.grid import Codes, FloatCodes, Grid, WholeCodes

Layout = Literal["float8", "int8", "packed"]
WORD = 32
_FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
# Entries that are decoded or encoded at a time.
_PIECE = 2**22
SCALE_DTYPES = frozenset({"F32", "BF16", "F16", "F8_E8M0", "U8"})


@dataclass(frozen=True)
class StoredTensor:
    """Names of the stored tensors that make up one weight, and what they mean.

    name, shape: of the weight, (..., rows, columns). block: rows and columns that share a scale. lead: whether scales have the weight's
    leading sides (a stack of experts). dtype: safetensors code of the codes. bits: of one code.
    """

    name: str
    shape: tuple[int, ...]
    codes: str
    scale: str
    layout: Layout
    block: tuple[int, int]
    dtype: str
    bits: int = 8
    zero: str | None = None
    shape_in: str | None = None

    @property
    def names(self) -> list[str]:
        return [name for name in (self.codes, self.scale, self.zero, self.shape_in) if name is not None]

    @property
    def scales_shape(self) -> tuple[int, ...]:
        rows, columns = (-(-side // size) for side, size in zip(self.shape[-2:], self.block, strict=True))
        return (*self.shape[:-2], rows, columns)

    @property
    def number_kinds(self) -> Codes:
        return FloatCodes(_FLOAT8[self.dtype]) if self.layout == "float8" else WholeCodes(self.bits)

    def grid(self, read: Callable[[str], Tensor], place: int | None = None) -> Grid:
        """The grid of the weight, or of one matrix of a stack. read: gives a stored tensor by name."""
        scales = _scales(read(self.scale)).reshape(self.scales_shape)
        zeros = None if self.zero is None else self._zeros(read(self.zero)).reshape(self.scales_shape)
        if place is not None:
            scales, zeros = scales[place], None if zeros is None else zeros[place]
        rows, columns = self.shape[-2:]
        return Grid.of_blocks(self.number_kinds, scales, zeros, (rows, columns), self.block)

    def decode(self, read: Callable[[str], Tensor]) -> Tensor:
        """The weight in float32. Raises CheckpointFormatError where weight_shape says another shape than the header gives."""
        self._check_shape(read)
        stored = read(self.codes)
        out = torch.empty(self.shape)
        for place, rows in self._pieces():
            one, target = (stored, out) if place is None else (stored[place], out[place])
            target[rows] = self.grid(read, place).part(rows, slice(None)).decode(self.unpacked(one[rows]))
        return out

    def encode(self, values: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """What to store in place of the codes for float32 values of the weight's shape; the scales stay.

        Codes of values that are unchanged stay what they are, NaN among them.
        """
        stored = read(self.codes)
        out = torch.empty_like(stored)
        for place, rows in self._pieces():
            one, new, target = (stored, values, out) if place is None else (stored[place], values[place], out[place])
            grid, old = self.grid(read, place).part(rows, slice(None)), self.unpacked(one[rows])
            before = grid.decode(old)
            same = (before == new[rows]) | (before.isnan() & new[rows].isnan())
            # Through float32: torch has no `where` of float8.
            codes = torch.where(same, old.float(), grid.encode(new[rows])).to(old.dtype)
            target[rows] = pack(codes, self.bits) if self.layout == "packed" else codes
        return out

    def _pieces(self) -> Iterator[tuple[int | None, slice]]:
        """Rows of each matrix of a stack (None: there is one), in pieces whose temporaries are small beside the weight."""
        step = max(1, _PIECE // max(1, self.shape[-1]))
        for place in range(self.shape[0]) if len(self.shape) == 3 else (None,):
            for start in range(0, self.shape[-2], step):
                yield place, slice(start, start + step)

    def unpacked(self, stored: Tensor) -> Tensor:
        """Codes of the weight's shape: float8, or int8."""
        return unpack(stored, self.bits, self.shape[-1]) if self.layout == "packed" else stored

    def _zeros(self, stored: Tensor) -> Tensor:
        if self.layout != "packed" or stored.dtype != torch.int32:
            return stored
        # Zero points are packed along the rows.
        return unpack(stored.transpose(-1, -2), self.bits, self.scales_shape[-2]).transpose(-1, -2)

    def _check_shape(self, read: Callable[[str], Tensor]) -> None:
        if self.shape_in is not None and tuple(read(self.shape_in).tolist()) != self.shape:
            raise CheckpointFormatError(
                f"{self.shape_in} says {read(self.shape_in).tolist()}, but {self.codes} and its scales are those of {list(self.shape)}. "
                "Download or save the checkpoint again."
            )


def _scales(stored: Tensor) -> Tensor:
    """Scales in float32. Exponents without sign and mantissa are stored as float8_e8m0fnu, or as bytes: 2^(byte − 127)."""
    if stored.dtype == torch.uint8:
        stored = stored.view(torch.float8_e8m0fnu)
    return stored.float()


def unpack(stored: Tensor, bits: int, columns: int) -> Tensor:
    """int32 words (..., words) to int8 codes (..., columns): lowest bits first, code + 2^(bits−1) without sign."""
    per_word = WORD // bits
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    found = (stored.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    found = found.reshape(*stored.shape[:-1], stored.shape[-1] * per_word)[..., :columns]
    return (found - (1 << (bits - 1))).to(torch.int8).contiguous()


def pack(codes: Tensor, bits: int) -> Tensor:
    """The reverse of `unpack`; the unused bits of the last word are 0."""
    per_word = WORD // bits
    raised = codes.to(torch.int32) + (1 << (bits - 1))
    raised = torch.nn.functional.pad(raised, (0, -raised.shape[-1] % per_word))
    words = raised.reshape(*raised.shape[:-1], -1, per_word)
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    # The fields do not overlap: their sum is their union.
    return (words << shifts).sum(-1, dtype=torch.int32).contiguous()


@dataclass
class Found:
    """What a format makes of a checkpoint. tensors: by the weight's name. beside: stored tensors that are no weights (scales of activations
    and caches) and go with the format. problems: one line each."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    beside: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def check_table(self, table: str, kind: str, info: TensorInfo | None, tensor: StoredTensor, allowed: frozenset[str], where: str) -> None:
        """Notes where scales or zero points are absent, or of a dtype or shape that does not fit."""
        wanted = tensor.scales_shape
        if info is None:
            self.problems.append(f"{where}: tensor {tensor.codes} ({tensor.dtype}) has no {kind} {table}. Download or save the checkpoint again.")
            return
        if info.dtype not in allowed:
            self.problems.append(f"{where}: the {kind} {table} is {info.describe()}; {', '.join(sorted(allowed))} are known.")
        sides = list(info.shape)
        # One scale for all is stored as a number, or as a matrix of it; one for each row as a vector or a column.
        if sides != list(wanted) and (math.prod(sides) != math.prod(wanted) or [s for s in sides if s > 1] != [s for s in wanted if s > 1]):
            self.problems.append(
                f"{where}: the {kind} {table} is {info.describe()}, but {tensor.codes} {list(tensor.shape)} in blocks of "
                f"{tensor.block[0]}×{tensor.block[1]} needs {list(wanted)}. Check quantization_config, or save the checkpoint again."
            )
