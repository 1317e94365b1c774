"""The empirical Fisher matrix F = (1/N) Σ g_i g_iᵀ by its Gram matrix, and what the Alignment Instability Condition asks of it.

"The Geometry of Alignment Collapse" (Springer et al. 2026). The nonzero spectrum of F is that of K_ij = ⟨g_i, g_j⟩/N, so no
random projection is needed: F = Σ_j μ_j φ_j φ_jᵀ with φ_j = Σ_i a_ij g_i/√(N μ_j) for K a_j = μ_j a_j, and for any h the
numbers ⟨g_i, h⟩ say all that F does to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lox_merge.maths.geometry import EffectiveRanks, effective_ranks, leading_count


@dataclass(frozen=True)
class FisherSpectrum:
    """Eigenvalues μ (k,) of F that are not zero, descending, and the coordinates of their vectors: all float64, on the CPU.

    coordinates: (n, k): a_ij/√(N μ_j), so that φ_j = Σ_i coordinates_ij g_i has norm 1. trace: tr F = Σ μ.
    """

    values: Tensor
    coordinates: Tensor
    trace: float

    @property
    def effective(self) -> EffectiveRanks:
        return effective_ranks(self.values, self.trace, complete=True)

    def dimension(self, energy: float) -> int | None:
        """d: the fewest eigenvalues that hold this share of tr F; None for F = 0."""
        return leading_count(self.values, self.trace, energy)

    def smallest(self, dimension: int | None) -> float | None:
        """λ = λ_d; None for F = 0."""
        return None if dimension is None else float(self.values[dimension - 1])

    def tail(self, dimension: int | None) -> float | None:
        """ε_tail = Σ_{j>d} λ_j."""
        return None if dimension is None else float(self.values[dimension:].sum())

    def along(self, products: Float[Tensor, "*many n"]) -> Float[Tensor, "*many k"]:
        """⟨φ_j, h⟩ from ⟨g_i, h⟩."""
        return products.double().cpu() @ self.coordinates


def fisher_spectrum(gram: Float[Tensor, "n n"]) -> FisherSpectrum:
    """From the inner products ⟨g_i, g_j⟩ (not divided by N), float64. Eigenvalues below n·eps of the largest are zero."""
    count = len(gram)
    values, vectors = torch.linalg.eigh(gram.double().cpu() / count)
    values, vectors = values.flip(0), vectors.flip(1)
    floor = float(values[0]) * count * torch.finfo(torch.float64).eps
    kept = int((values > max(floor, 0.0)).sum())
    values = values[:kept].clone()
    return FisherSpectrum(values, vectors[:, :kept] / (count * values).sqrt(), float(values.sum()))


def overlap_scores(products: Float[Tensor, "*many n"]) -> Float[Tensor, "*many"]:
    """OS = vec(ΔW)ᵀ F vec(ΔW) = (1/N) Σ ⟨g_i, ΔW⟩² (sec. 7.2, exact) from products ⟨g_i, ΔW⟩."""
    return products.double().square().mean(-1)


def expected_overlap_score(squared_norm: float, trace: float, parameters: int) -> float:
    """What OS is on average for a ΔW of this ||ΔW||² that points anywhere alike: ||ΔW||² tr F / n (Theorem 4.1)."""
    return squared_norm * trace / parameters


def projection_norm(spectrum: FisherSpectrum, products: Float[Tensor, "*many n"], dimension: int) -> Float[Tensor, "*many"]:
    """||P h||, P onto the first `dimension` eigenvectors, from ⟨g_i, h⟩."""
    return spectrum.along(products)[..., :dimension].square().sum(-1).sqrt()


def weighted_norm(spectrum: FisherSpectrum, products: Float[Tensor, "*many n"], dimension: int) -> Float[Tensor, "*many"]:
    """||F^{1/2} P h|| = √(Σ_{j≤d} μ_j ⟨φ_j, h⟩²): the coupling γ for h = ∇g·g (Definition 5.1)."""
    along = spectrum.along(products)[..., :dimension]
    return (along.square() * spectrum.values[:dimension]).sum(-1).sqrt()


def expected_weighted_norm(spectrum: FisherSpectrum, norm: float, dimension: int, parameters: int) -> float:
    """√E||F^{1/2} P r||² for an r of this norm that points anywhere alike: ||r|| √(Σ_{j≤d} μ_j / n)."""
    return norm * math.sqrt(float(spectrum.values[:dimension].sum()) / parameters)


PREDICTIONS = ("projection", "loss", "quadratic_loss", "second_order_loss")


def predictions(
    spectrum: FisherSpectrum, gradient: Float[Tensor, "*many n"], curvature: Float[Tensor, "*many n"], dimension: int, time: float
) -> dict[str, Float[Tensor, "*many"]]:
    """PREDICTIONS at gradient-flow time t (learning rate × steps of plain gradient descent) from ⟨g_i, g⟩ and ⟨g_i, ∇g·g⟩.

    projection: γt²/2, which Theorem 6.2 gives for ||F^{1/2} P (θ(t) − θ*)||. loss: λγ²t⁴, the paper's scaling (Corollary 6.3), with
    no constant. quadratic_loss: γ²t⁴/8, which Theorems 6.1 and 6.2 give together; γ is weighted by F already, so λ does not
    enter again. second_order_loss: ½||F^{1/2} P (−t g + t²/2 ∇g·g)||², the first-order overlap included.
    """
    coupling = weighted_norm(spectrum, curvature, dimension)
    moved = weighted_norm(spectrum, curvature * (time**2 / 2) - gradient * time, dimension)
    return {
        "projection": coupling * time**2 / 2,
        "loss": float(spectrum.values[dimension - 1]) * coupling**2 * time**4,
        "quadratic_loss": coupling**2 * time**4 / 8,
        "second_order_loss": moved**2 / 2,
    }
