"""A change ΔW of one parameter, dense or as LoRA's factors, and the few inner products that a watch asks of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lox_merge.maths.gradients import Contribution, Outer, inner_products, wide

# Entries that are widened to float64 at once.
_PIECE = 2**22


@dataclass(frozen=True)
class DenseChange:
    """values: ΔW as the parameter is stored, float32 or wider. transposed: that is (d_in, d_out)."""

    values: Tensor
    transposed: bool = False

    @property
    def matrix(self) -> Tensor:
        """ΔW of the map, (d_out, d_in)."""
        return self.values.T if self.transposed else self.values

    def with_gradients(self, found: Sequence[Contribution], examples: int) -> Float[Tensor, " n"]:
        """(n,) float64 on the CPU: ⟨g_i, ΔW⟩."""
        total = torch.zeros(examples, dtype=torch.float64)
        for some in found:
            total += inner_products(moved(some, self.values.device), self.values, examples).cpu()
        return total

    def squared_norm(self) -> float:
        """||ΔW||²_F."""
        return squared_norm(self.values)

    def projected(self, basis: Float[Tensor, "d_out k"]) -> Float[Tensor, "k d_in"]:
        """UᵀΔW."""
        return basis.to(self.values.dtype).T @ self.matrix

    def along(self, left: Float[Tensor, "d_out j"], right: Float[Tensor, "d_in j"]) -> Float[Tensor, " j"]:
        """u_jᵀ ΔW v_j, float64 on the CPU."""
        return ((self.matrix @ right.to(self.values.dtype)) * left).double().sum(0).cpu()

    def with_matrix(self, other: Float[Tensor, "d_out d_in"]) -> float:
        """⟨A, ΔW⟩ for A in the map's orientation."""
        return dot(other, self.matrix)


@dataclass(frozen=True)
class LowRankChange:
    """ΔW = left @ right, (d_out, r) and (r, d_in) float32 or wider, the scale in `left`: no d_out × d_in matrix is formed."""

    left: Tensor
    right: Tensor

    def with_gradients(self, found: Sequence[Contribution], examples: int) -> Float[Tensor, " n"]:
        """(n,) float64 on the CPU: ⟨g_i, ΔW⟩ = Σ_s (Bᵀδ_s)·(A x_s)."""
        total = torch.zeros(examples, dtype=torch.float64, device=self.left.device)
        for some in found:
            assert isinstance(some, Outer) and some.slot is None, "adapters of linear layers only"
            here = moved(some, self.left.device)
            assert isinstance(here, Outer)
            rows = (here.gradients.to(self.left.dtype) @ self.left) * (here.inputs.to(self.right.dtype) @ self.right.T)
            total.index_add_(0, here.owners, rows.double().sum(-1))
        return total.cpu()

    def squared_norm(self) -> float:
        """||B A||²_F = ⟨BᵀB, A Aᵀ⟩."""
        left, right = self.left.double(), self.right.double()
        return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))

    def projected(self, basis: Float[Tensor, "d_out k"]) -> Float[Tensor, "k d_in"]:
        """UᵀΔW."""
        return (basis.to(self.left.dtype).T @ self.left) @ self.right

    def along(self, left: Float[Tensor, "d_out j"], right: Float[Tensor, "d_in j"]) -> Float[Tensor, " j"]:
        """u_jᵀ ΔW v_j, float64 on the CPU."""
        return ((self.left.T @ left.to(self.left.dtype)) * (self.right @ right.to(self.right.dtype))).double().sum(0).cpu()

    def with_matrix(self, other: Float[Tensor, "d_out d_in"]) -> float:
        """⟨A, ΔW⟩ for A in the map's orientation."""
        return dot(self.left.T @ other.to(self.left.dtype), self.right)


Change = DenseChange | LowRankChange


def moved(found: Contribution, device: torch.device) -> Contribution:
    """The same on another device; nothing is copied where it is there already."""
    return replace(found, **{name: value.to(device) for name, value in vars(found).items() if isinstance(value, Tensor)})  # type: ignore[arg-type]


def squared_norm(values: Tensor) -> float:
    """Sum of squares, in float64 by pieces."""
    return sum(float(piece.double().square().sum()) for piece in torch.split(values.reshape(-1), _PIECE))


def dot(one: Tensor, other: Tensor) -> float:
    """⟨A, B⟩ of two matrices of one shape: products and sums in float64, some rows at a time."""
    step = max(1, _PIECE // max(1, one.shape[-1]))
    pairs = zip(torch.split(one, step), torch.split(other, step), strict=True)
    return sum(float((wide(a).double() * wide(b).double()).sum()) for a, b in pairs)
