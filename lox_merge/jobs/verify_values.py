"""Are written values those that the recipe gives, where another machine made them again?

Sums in another order move an update by what the SVD's tolerance allows. A value near the midpoint of two neighbours rounds the other way then,
and one that the update nearly cancels moves by many units of its last place, which are small.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lox_merge.maths.rounding import Rounding, round_nearest

# Where it is not known how near a value was to a midpoint, so many may have gone to a neighbour.
_LARGEST_SHARE_OF_NEIGHBOURS = 0.02
# float32 rounds each of the few sums that lead to a value.
_FLOAT32_SUMS = 2 * torch.finfo(torch.float32).eps


def edit_difference(
    written: Tensor, expected: Tensor, before: Tensor, unrounded: Callable[[], Tensor], *, tolerance: float, rounding: Rounding
) -> str:
    """How an edited tensor differs from what the recipe gives, "" where only another order of sums shows.

    written, expected: of one dtype. before: the same without the edit. unrounded: gives what is expected in float32.
    tolerance, rounding: the recipe's.
    """
    if written.dtype.itemsize >= 4:  # an edit in float32 keeps the error of its SVD
        near = bool(_within(written, expected, 1e-5 * _largest(expected)).all())
        return "" if near else copy_difference(written, expected)
    exact = unrounded()
    slack = tolerance * _largest(exact - before.float()) + _FLOAT32_SUMS * exact.abs()
    if rounding != "nearest":
        units = torch.finfo(written.dtype).eps * torch.maximum(written.float().abs(), expected.float().abs())
        moved = float((~_within(written, expected, slack)).float().mean())
        sound = moved <= _LARGEST_SHARE_OF_NEIGHBOURS and bool(_within(written, expected, units + slack).all())
        return "" if sound else copy_difference(written, expected)
    lowest, highest = (round_nearest(exact + sign * slack, written.dtype) for sign in (-1, 1))
    fits = ((lowest <= written) & (written <= highest)) | _same(written, expected)
    return "" if bool(fits.all()) else copy_difference(written, expected)


def copy_difference(written: Tensor, expected: Tensor) -> str:
    """How a tensor differs from another that it should equal bit by bit."""
    if not written.is_floating_point():
        return f"{int((written != expected).sum()):,} of {written.numel():,} values differ"
    different = ~_same(written, expected)
    if not different.any():
        return "zeros of another sign, or NaN of other bits"
    gap = (written.double() - expected.double()).abs()[different].max()
    return f"{int(different.sum()):,} of {written.numel():,} values differ, by up to {float(gap):.3g}"


def code_difference(written: Tensor, expected: Tensor) -> str:
    """The same for codes of a quantised tensor, integers or of a float8 dtype: neighbouring ones here and there are no difference."""
    if written.dtype != torch.int8:
        # Numbers of a float8 dtype are in the order of their bits, the sign aside.
        written, expected = (torch.where((bits := part.view(torch.uint8).int()) < 128, bits, 128 - bits) for part in (written, expected))
    gap = (written.int() - expected.int()).abs()
    count = int((gap > 0).sum())
    if int(gap.max()) <= 1 and count <= _LARGEST_SHARE_OF_NEIGHBOURS * gap.numel():
        return ""
    return f"{count:,} of {gap.numel():,} codes differ, by up to {int(gap.max())} steps"


def _within(written: Tensor, expected: Tensor, allowed: Tensor | float) -> Tensor:
    return ((written.double() - expected.double()).abs() <= allowed) | _same(written, expected)


def _same(one: Tensor, other: Tensor) -> Tensor:
    return (one == other) | (one.isnan() & other.isnan())


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
