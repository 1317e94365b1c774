"""Norms that do not drift, matrix products that do not round inputs, and the rounding noise of a stored dtype."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# 99 % quantile of the Tracy-Widom law of order 1.
_TRACY_WIDOM_99 = 2.0234


# The setting is the process's, not the thread's: whoever comes first turns TF32 off, whoever leaves last puts it back.
_LOCK = threading.Lock()
_inside = 0
_put_back: Callable[[], None] | None = None


@contextmanager
def full_precision_matmul(device: torch.device) -> Iterator[None]:
    """float32 products in float32 on CUDA too: TF32 keeps 10 bits of mantissa, and every residual would end near 1e-3."""
    global _inside, _put_back
    if device.type != "cuda":
        yield
        return
    with _LOCK:
        if _inside == 0:
            _put_back = _without_tf32()
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if _inside == 0 and _put_back is not None:
                _put_back()


def _without_tf32() -> Callable[[], None]:
    """Turns TF32 off for matrix products. Returns what puts the setting back, by the interface that it was made with: torch 2.9 has
    two of them, and refuses to answer through the old one what was set through the new."""
    matmul = torch.backends.cuda.matmul
    try:
        on, precision = matmul.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        chosen = matmul.fp32_precision
        matmul.fp32_precision = "ieee"
        return lambda: setattr(matmul, "fp32_precision", chosen)
    if not on:
        return lambda: None
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(precision)


def float32_difference(later: Tensor, earlier: Tensor) -> Tensor:
    """later − earlier in float32. float64 weights are subtracted as such: of their difference float32 keeps what matters."""
    wide = torch.promote_types(torch.float32, torch.promote_types(later.dtype, earlier.dtype))
    return (later.to(wide) - earlier.to(wide)).float()


def frobenius_norm(matrix: Tensor) -> float:
    """||A||_F of a floating matrix: rows in float32, their sum in float64.

    One float32 accumulation over 16.7 million entries was off by 1e-3; rows are short enough. Where their squares overflow: all in float64.
    """
    norm = float(frobenius_norm_here(matrix))
    return float(torch.linalg.vector_norm(matrix.double())) if math.isinf(norm) else norm


def frobenius_norm_here(matrix: Tensor) -> Tensor:
    """The same, float64, on the matrix's device: nothing is waited for, so that it is infinite where float32 overflows."""
    if matrix.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=matrix.device)
    rows = torch.linalg.vector_norm(matrix, dim=-1, dtype=torch.float32 if matrix.dtype != torch.float64 else None)
    norm: Tensor = rows.double().norm()
    return norm


# Integer of the same size, and the bits of the exponent in it.
_EXPONENTS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


def powers_of_two(values: Tensor) -> Tensor:
    """2^⌊log2|w|⌋ in float32 (float64 of float64); 0 where w is 0 or subnormal. Ten times as fast as frexp and ldexp."""
    integer, mask = _EXPONENTS[values.dtype]
    power = (values.view(integer) & mask).view(values.dtype)
    return power if power.dtype == torch.float64 else power.float()


def rounding_noise_edge(stored: Tensor) -> float:
    """Singular value that rounding to the stored dtype alone exceeds in one delta of this shape in a hundred.

    stored: (d_out, d_in), the aligned weights in their stored dtype. Rounding to nearest is uniform over one unit in the
    last place, so the noise has variance ulp(w)²/12 per entry. Its spectrum ends near the root mean square times
    (√d_out + √d_in), the Marchenko-Pastur edge; the largest value fluctuates about it as Tracy and Widom found, and the
    99 % quantile is taken (Johnstone 2001, Annals of Statistics 29(2), Theorem 1.1). Deltas below one unit in the last
    place are rounded less evenly than that; then a few directions of noise may pass.
    """
    rows, columns = stored.shape
    if min(rows, columns) == 0:
        return 0.0
    root_rows, root_columns = math.sqrt(rows - 0.5), math.sqrt(columns - 0.5)
    centre = (root_rows + root_columns) ** 2
    spread = (root_rows + root_columns) * (1 / root_rows + 1 / root_columns) ** (1 / 3)
    return math.sqrt(rounding_variance(stored)) * math.sqrt(centre + _TRACY_WIDOM_99 * spread)


def rounding_variance(stored: Tensor) -> float:
    """Mean of ulp(w)²/12 over a matrix in its stored dtype: the variance of rounding to nearest, per entry."""
    rows, columns = stored.shape
    information = torch.finfo(stored.dtype)
    total = torch.zeros((), dtype=torch.float64, device=stored.device)  # a number of Python's would be waited for, piece by piece
    step = max(1, (2**18 if stored.device.type == "cpu" else 2**25) // max(1, columns))
    for start in range(0, rows, step):
        # The spacing of a dtype at w is eps times the power of two below |w|: w without its sign and mantissa.
        power = powers_of_two(stored[start : start + step]).clamp_min_(information.tiny)
        total += torch.linalg.vector_norm(power, dim=-1).double().square().sum()
    if math.isinf(float(total)):  # squares of weights from 1e19 on
        pieces = (powers_of_two(stored[start : start + step]).double() for start in range(0, rows, step))
        return sum(float(power.square().sum()) for power in pieces) * information.eps**2 / max(1, stored.numel()) / 12
    return float(total) * information.eps**2 / max(1, stored.numel()) / 12
