"""Thin rows times a batch of large matrices, by kernels of our own where a GPU has them."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from lox_merge.errors import LoxMergeWarning
from lox_merge.maths.transport import to_device

_LOCK = threading.Lock()


def fast_kernels(device: torch.device) -> ModuleType | None:
    """maths.thin_kernels where they can be built for this device; None on a CPU, on GPUs without TF32 (before Ampere, AMD's), and, with
    a warning that says why, where Triton is missing or does not work."""
    with _LOCK:
        return _built(device)


@cache
def _built(device: torch.device) -> ModuleType | None:
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] < 8:
        return None
    try:
        from lox_merge.maths import thin_kernels

        thin_kernels.try_out(device)
    except Exception as error:  # of the compiler, of the driver, of what is not installed: all have the same remedy
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"Triton's kernels cannot be used on {device} ({first}); SVDs take about twice as long, with other last bits. "
            "They need the triton that belongs to this torch, and a C compiler.",
            LoxMergeWarning,
            stacklevel=4,
        )
        return None
    return thin_kernels


def here(device: torch.device) -> AbstractContextManager[object]:
    """Kernels of our own start on the current device, whatever their tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class LongSide:
    """Products of thin rows with a batch of matrices (b, d_out, d_in) from one side to the other.

    address: (1,) int64 on the device, where their place in memory is written for products that are recorded (see maths.replayed); by
    default memory of its own.
    """

    def __init__(self, matrices: Float[Tensor, "b d_out d_in"], address: Tensor | None = None) -> None:
        wide = matrices.shape[1] <= matrices.shape[2]
        self._from_short, self._from_long = (matrices, matrices.mT) if wide else (matrices.mT, matrices)
        self.short, self.long = self._from_short.shape[1:]
        fast = fast_kernels(matrices.device)
        # Kernels read 16 bytes at a time.
        self._fast = fast if matrices.is_contiguous() and matrices.data_ptr() % 16 == 0 else None
        if self._fast is not None:
            place = to_device(torch.tensor([matrices.data_ptr()]), matrices.device)
            self._address = place if address is None else address.copy_(place)

    @property
    def recordable(self) -> bool:
        """Whether a product that was recorded with other matrices of this shape works on these."""
        return self._fast is not None

    def to_long(self, rows: Tensor, chosen: Sequence[int], out: Tensor) -> Tensor:
        """out[i] = rows[i] A_i for the chosen; the others keep what they had."""
        return self._product(rows, self._from_short, chosen, out)

    def to_short(self, rows: Tensor, chosen: Sequence[int], out: Tensor) -> Tensor:
        return self._product(rows, self._from_long, chosen, out)

    def _product(self, rows: Tensor, matrices: Tensor, chosen: Sequence[int], out: Tensor) -> Tensor:
        for part in runs(chosen):
            if self._fast is not None and rows.shape[1] <= self._fast.LARGEST_WIDTH:
                self._fast.rows_times(rows[part], matrices, out[part], self._address, part.start)
            else:
                torch.bmm(rows[part], matrices[part], out=out[part])
        return out


def products_of_rows(rows: Float[Tensor, "b w n"], others: Float[Tensor, "b r n"]) -> Float[Tensor, "b w r"]:
    """rows @ othersᵀ in float64. rows: float32; others: float64, rows of a contiguous tensor. A product library adds up a long n within
    one of a GPU's multiprocessors."""
    fast = fast_kernels(rows.device)
    if fast is not None and rows.shape[1] <= fast.LARGEST_WIDTH and others.shape[1] <= fast.LARGEST_HEIGHT and others.is_contiguous():
        product: Tensor = fast.products_of_rows(rows, others)
        return product
    return rows.double() @ others.mT


def runs(chosen: Sequence[int]) -> list[slice]:
    """Ascending indices as slices: matrices that are done are left out without copying the others."""
    parts: list[slice] = []
    for index in chosen:
        if parts and parts[-1].stop == index:
            parts[-1] = slice(parts[-1].start, index + 1)
        else:
            parts.append(slice(index, index + 1))
    return parts
