"""The alignment-sensitive subspace: the leading eigenvectors of the Fisher matrix of safe completions, at one point in weight space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lox_merge.diagnostics.curvature.gram import FisherGram
from lox_merge.diagnostics.curvature.walk import Example, walk
from lox_merge.errors import RequestError
from lox_merge.maths.fisher import FisherSpectrum, fisher_spectrum
from lox_merge.maths.gradients import Contribution, add_weighted_sums
from lox_merge.maths.precision import full_precision_matmul
from lox_merge.safety.progress import ProgressFactory, no_progress

ENERGY = 0.9


@dataclass(frozen=True)
class SafeSubspace:
    """M of Definition 3.4, over the joint space of `names` (one parameter, or several with the blocks between them).

    parameters: n, entries of all of them. dimension: d; None where every gradient is zero. spectrum: of F, with the eigenvectors'
    coordinates in the gradients: `lox_merge.maths.fisher` takes it with products ⟨g_i, h⟩, which `products_with` gives.
    """

    names: tuple[str, ...]
    parameters: int
    spectrum: FisherSpectrum
    dimension: int | None

    def coordinates(self) -> Tensor:
        """(n_examples, d) float64: φ_j = Σ_i coordinates_ij g_i, orthonormal."""
        return self.spectrum.coordinates[:, : self.dimension or 0]


def safe_subspace(gram: FisherGram, names: Sequence[str] | None = None, *, energy: float = ENERGY, dimension: int | None = None) -> SafeSubspace:
    """d: `dimension`, at most the rank of F, or the fewest eigenvalues that hold `energy` of tr F (the paper gives no rule).

    Raises RequestError for an energy outside (0, 1], a dimension below 1.
    """
    if not 0 < energy <= 1:
        raise RequestError(f"an energy of {energy} is not a share of the trace; give one above 0 and at most 1, such as 0.9.")
    if dimension is not None and dimension < 1:
        raise RequestError(f"{dimension} dimensions hold nothing; give 1 or more.")
    chosen = gram.names if names is None else tuple(names)
    spectrum = fisher_spectrum(gram.total(chosen))
    rank = len(spectrum.values)
    found = spectrum.dimension(energy) if dimension is None else (min(dimension, rank) or None)
    return SafeSubspace(chosen, gram.size(chosen), spectrum, found)


def combined_gradients(
    model: Any,
    examples: Sequence[Example],
    gram: FisherGram,
    weights: Tensor,
    *,
    names: Sequence[str] | None = None,
    batch_size: int | None = None,
    progress: ProgressFactory = no_progress,
) -> dict[str, Tensor]:
    """Σ_i weights_ij g_i by parameter name: (k, *shape) float32 or wider, on the parameter's device; one pass for all k.

    weights: (n_examples, k). With `SafeSubspace.coordinates()` these are the eigenvectors φ_j themselves, k times the model in
    memory; with 1/n_examples the mean gradient.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in set(names or gram.names)}
    out = {
        name: torch.zeros(weights.shape[1], *value.shape, dtype=torch.promote_types(value.dtype, torch.float32), device=value.device)
        for name, value in parameters.items()
    }

    def emit(name: str, found: Contribution) -> None:
        add_weighted_sums(out[name], found, weights)

    with full_precision_matmul(model.device):
        walk(model, gram.sites, set(out), examples, emit, reduction=gram.reduction, batch_size=batch_size, progress=progress, what="directions")
    return out
