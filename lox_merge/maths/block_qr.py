"""Orthonormal rows of many thin blocks at once, without a look at the device in between."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Rows farther from orthonormal than this are not used: float32 keeps about 1e-7, and the recurrences need no more than 1e-5.
_LARGEST_ERROR = 1e-6


def orthonormal_rows(block: Float[Tensor, "b w n"]) -> tuple[Float[Tensor, "b w n"], Bool[Tensor, " b"]]:
    """Orthonormal bases of the row spaces of `block`, float32, and which of them were lost: rows dependent to working precision.

    block: (b, w, n) float32, w far below n. Cholesky QR, twice, in float64 (Yamamoto et al. 2015, "Roundoff error analysis of the
    CholeskyQR2 algorithm"): orthonormal to rounding for condition numbers up to about 1e7, beyond which float32 rows are dependent.
    Householder QR would take any rows, but goes column by column, a kernel each; this is a few products of thin matrices, and
    nothing in it makes the host wait: factorisations report failure in a tensor.
    """
    rows = block.double()
    identity = torch.eye(block.shape[1], dtype=rows.dtype, device=rows.device)
    failed = torch.zeros(block.shape[0], dtype=torch.bool, device=block.device)
    for _ in range(2):
        factor, information = torch.linalg.cholesky_ex(rows @ rows.mT, check_errors=False)
        failed |= information.ne(0)
        # The inverse of w × w, then a product: substitution along n columns is what batched solvers are slow at.
        rows = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False) @ rows
    error = (rows @ rows.mT - identity).abs().amax(dim=(1, 2))
    # Not >, or NaN would pass.
    return rows.float(), failed | ~(error <= _LARGEST_ERROR)
