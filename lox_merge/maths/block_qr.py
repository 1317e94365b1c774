"""Orthonormal rows of many thin blocks at once, without a look at the device in between."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lox_merge.maths.thin_products import fast_kernels

# Rows are nearly orthonormal where no entry of their Gram matrix is farther than this from the identity's: one round more is enough.
NEARLY = 0.1


def orthonormal_rows(
    block: Float[Tensor, "b w n"], lost: Bool[Tensor, " b"], *, nearly: bool = False
) -> tuple[Float[Tensor, "b w n"], Float[Tensor, "b w w"]]:
    """One round of Cholesky QR: rows with the row spaces of `block`, float32, and its Gram matrices, float64.

    block: (b, w, n) float32, w far below n. lost: set to True, in place, for blocks whose rows are dependent to working precision; their
    result, and that of those that were lost before, is zeros. nearly: the second round, after which rows are orthonormal to rounding;
    blocks that the first did not bring near to that are lost. In float64 the first round leaves an error of about 1e-16 times the squared
    condition number, so two do for condition numbers up to about 1e7, beyond which float32 rows are dependent (Yamamoto et al. 2015,
    "Roundoff error analysis of the CholeskyQR2 algorithm"). Householder QR would take any rows, but goes column by column, a kernel
    each; this is a few products of thin matrices, and nothing in it makes the host wait: factorisations report failure in a tensor.
    """
    fast = fast_kernels(block.device)
    if fast is not None and block.shape[1] <= fast.LARGEST_WIDTH:
        rows, gram = fast.orthonormal_rows(block, lost, NEARLY if nearly else None)
        return rows, gram
    wide = block.double()
    gram = wide @ wide.mT
    identity = torch.eye(block.shape[1], dtype=wide.dtype, device=wide.device)
    factor, information = torch.linalg.cholesky_ex(gram, check_errors=False)
    lost |= information.ne(0)
    if nearly:
        # Not >, or NaN would pass.
        lost |= ~((gram - identity).abs().amax(dim=(1, 2)) <= NEARLY)
    # The inverse of w × w, then a product: substitution along n columns is what batched solvers are slow at.
    rows = (torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False) @ wide).float()
    return torch.where(lost[:, None, None], torch.zeros_like(rows), rows), gram
