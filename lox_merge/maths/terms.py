"""Updates made of rank-one terms in a fixed order, whose first k terms are an update too: Delta's own, and random ones of equal norm."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lox_merge.maths.edits import Update, lox_update
from lox_merge.maths.subspace import Subspace


@dataclass(frozen=True)
class Terms:
    """T_k = scales[k] * (left[:, :k] @ right[:, :k].T), for any k; beyond the number of columns T_k stays the last one.

    left: (d_out, n), right: (d_in, n), float32. scales: (n + 1,) float64, None for 1 throughout.
    """

    left: Tensor
    right: Tensor
    scales: Tensor | None = None

    def first(self, rank: int) -> Update:
        """T_rank as thin factors: views, unless there are scales."""
        left, right = self.left[:, :rank], self.right[:, :rank]
        return Update(left if self.scales is None else left * float(self.scales[left.shape[1]]), right)

    def negative(self) -> Terms:
        return replace(self, left=-self.left)

    def transposed(self) -> Terms:
        """The same of the transposed matrix."""
        return Terms(self.right, self.left, self.scales)

    def to(self, device: torch.device) -> Terms:
        """Contiguous and on `device`. The scales stay where they are: one number of them is used at a time."""
        return replace(self, left=self.left.to(device).contiguous(), right=self.right.to(device).contiguous())


def leading_terms(subspace: Subspace) -> Terms:
    """The terms of Delta itself by falling singular value: T_k = Proj_k(Delta)."""
    update = lox_update(subspace, 1.0)
    assert update.left is not None and update.right is not None
    return Terms(update.left, update.right)


def random_terms(shape: tuple[int, int], singular_values: Float[Tensor, " n"], *, seed: int) -> Terms:
    """Q S P^T with Haar-random orthonormal Q (d_out, n) and P (d_in, n): Delta's singular values in directions that know nothing of it.

    Its first k terms have the Frobenius norm of Proj_k(Delta) for every k, each term that of Delta's, and they are nested as
    Delta's are. Random numbers come from a CPU generator, so every device gets the same ones.
    """
    # Beyond the seeds of 32 bits that callers have, so that no other matrix's first factor is this one's second.
    left, right = (haar_columns(size, len(singular_values), seed=own) for size, own in zip(shape, (seed, seed + 2**32), strict=True))
    return Terms((left * singular_values.cpu().double()).float(), right.float())


def random_subspace_terms(delta: Float[Tensor, "d_out d_in"], singular_values: Float[Tensor, " n"], *, seed: int) -> Terms:
    """Delta projected on the first k of n Haar-random output directions, scaled to the norm of Proj_k(Delta).

    Unlike `random_terms` its rows are mixtures of Delta's own rows, so it is no control free of alignment: it stands in between.
    """
    left = haar_columns(delta.shape[0], len(singular_values), seed=seed).to(delta)
    right = (left.T @ delta).T
    # The columns of `left` are orthonormal, so that squared norms of terms add up.
    reached = right.double().square().sum(0).cumsum(0).sqrt().cpu()
    wanted = singular_values.cpu().double().square().cumsum(0).sqrt()
    scales = torch.where(reached > 0, wanted / reached, torch.zeros_like(wanted))
    return Terms(left, right, torch.cat([torch.ones(1, dtype=torch.float64), scales]))


def haar_columns(size: int, count: int, *, seed: int) -> Float[Tensor, "size count"]:
    """`count` orthonormal columns of Haar's law, float64: the QR of a Gaussian with the signs of R's diagonal (Mezzadri 2007).

    Without the signs, those of a Householder QR would depend on the first entries. Asking for more columns leaves the first ones
    as they are, up to rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(count)]
    if not columns:
        return torch.zeros(size, 0, dtype=torch.float64)
    orthonormal, upper = torch.linalg.qr(torch.stack(columns, 1))
    signed: Tensor = orthonormal * torch.where(upper.diagonal() < 0, -1.0, 1.0)
    return signed
