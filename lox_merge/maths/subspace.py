"""A truncated singular subspace and the certificate that says how far to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Side = Literal["left", "right"]

# sin(theta) above this is an angle that matters: more than 10 % of a direction may lie elsewhere.
AMBIGUOUS_ANGLE = 0.1


@dataclass(frozen=True)
class Certificate:
    """A-posteriori evidence for k computed triplets (u_i, s_i, v_i) of a matrix A, with A^T u_i = s_i v_i by construction.

    residual: eta = ||A V - U S||_F / s_k, computed with one explicit product after the iteration ended.
    next_singular_value: s_{k+1} as the same method found it; None when A has no further singular value.
    smallest_singular_value: s_k. passes: products with A or A^T that were spent. method: what computed it.
    Bounds: Wedin and Davis-Kahan, with r = s_{k+1}/s_k. A residual cannot see a direction that a Krylov method never
    met; a random start of at least 8 vectors makes that improbable, and no bound here claims more.
    """

    method: Literal["exact", "gram", "lanczos", "none"]
    residual: float
    smallest_singular_value: float
    next_singular_value: float | None
    passes: int

    @property
    def gap_ratio(self) -> float:
        """r = s_{k+1}/s_k in [0, 1]; 0 when nothing follows."""
        if not self.next_singular_value or self.smallest_singular_value == 0:
            return 0.0
        return min(1.0, self.next_singular_value / self.smallest_singular_value)

    @property
    def angle_bound(self) -> float | None:
        """Upper bound on ||sin Theta||_F between computed and true left subspace; None where no gap exists."""
        slack = 1 - self.gap_ratio**2
        return None if slack <= 0 else self.residual / slack

    @property
    def projection_error_bound(self) -> float | None:
        """Upper bound on ||(P - P_hat) A||_F, in the units of A; None where no gap exists."""
        slack = 1 - self.gap_ratio**2
        if slack <= 0:
            return None
        return self.smallest_singular_value * self.residual * math.sqrt(1 + self.gap_ratio**2) / slack

    @property
    def ambiguous(self) -> bool:
        """True when the span is not determined by A to a useful accuracy (s_k close to s_{k+1}). Its energy still is."""
        bound = self.angle_bound
        return bound is None or bound > AMBIGUOUS_ANGLE


@dataclass(frozen=True)
class Subspace:
    """Leading singular triplets of a matrix A of shape (d_out, d_in).

    left: (d_out, k) float32, orthonormal columns U_k. right: (d_in, k) float32, V_k.
    singular_values: (k,) float64 on the CPU, descending, in the units of A.
    norm: ||A||_F, accumulated in float64.
    """

    left: Float[Tensor, "d_out k"]
    singular_values: Float[Tensor, " k"]
    right: Float[Tensor, "d_in k"]
    norm: float
    certificate: Certificate

    @property
    def rank(self) -> int:
        return int(self.singular_values.numel())

    @property
    def energy_ratio(self) -> float | None:
        """||Proj_k(A)||^2_F / ||A||^2_F; None for A = 0 (undefined, not 0)."""
        return None if self.norm == 0 else min(1.0, float(self.singular_values.square().sum()) / self.norm**2)

    @property
    def alignment_ratio(self) -> float | None:
        """R_align = ||Proj_k(A)||_F / ||A||_F (LoX, arXiv 2506.15606, Eq. 1); None for A = 0."""
        energy = self.energy_ratio
        return None if energy is None else math.sqrt(energy)

    def truncate(self, rank: int) -> Subspace:
        """The first `rank` triplets. The certificate's residual stays an upper bound, rescaled to the new s_k."""
        if not 0 <= rank <= self.rank:
            raise ValueError(f"cannot truncate a subspace of rank {self.rank} to rank {rank}")
        if rank == self.rank:
            return self
        smallest = float(self.singular_values[rank - 1]) if rank else 0.0
        absolute = self.certificate.residual * self.certificate.smallest_singular_value
        certificate = replace(
            self.certificate,
            residual=absolute / smallest if smallest else 0.0,
            smallest_singular_value=smallest,
            next_singular_value=float(self.singular_values[rank]),
        )
        return Subspace(self.left[:, :rank], self.singular_values[:rank], self.right[:, :rank], self.norm, certificate)

    def low_rank(self) -> Float[Tensor, "d_out d_in"]:
        """Proj_k(A) = U_k S_k V_k^T as a dense float32 matrix."""
        return (self.left * self.singular_values.to(self.left)) @ self.right.T

    def project(self, matrix: Tensor, side: Side = "left") -> Tensor:
        """U_k U_k^T M (left) or M V_k V_k^T (right), for any M of shape (d_out, d_in), in float32."""
        values = matrix.to(self.left)
        if side == "left":
            return self.left @ (self.left.T @ values)
        return (values @ self.right) @ self.right.T


def empty_subspace(matrix: Tensor, norm: float, next_singular_value: float | None = None) -> Subspace:
    """Rank 0: no direction was asked for, or none exists (A = 0)."""
    rows, columns = matrix.shape
    return Subspace(
        left=torch.zeros(rows, 0, device=matrix.device),
        singular_values=torch.zeros(0, dtype=torch.float64),
        right=torch.zeros(columns, 0, device=matrix.device),
        norm=norm,
        certificate=Certificate("none", 0.0, 0.0, next_singular_value, 0),
    )
