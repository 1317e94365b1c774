"""The alignment-sensitive subspace at θ_0, kept in a form that gives ‖P(θ_t − θ_0)‖ and the overlap score without another pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lox_merge.diagnostics.curvature.arena import Arena
from lox_merge.diagnostics.curvature.gram import fisher_gram
from lox_merge.diagnostics.curvature.sites import find_sites
from lox_merge.diagnostics.curvature.subspace import SafeSubspace, safe_subspace
from lox_merge.diagnostics.curvature.walk import Example, Reduction, check_examples, walk
from lox_merge.errors import RequestError
from lox_merge.maths.fisher import expected_overlap_score, overlap_scores, projection_norm
from lox_merge.maths.gradients import Contribution
from lox_merge.maths.precision import full_precision_matmul
from lox_merge.maths.weight_changes import Change


@dataclass(frozen=True)
class Sensitivity:
    """projection: ‖P Δ‖; overlap_score: OS = (1/N) Σ ⟨g_i, Δ⟩². expected: what each is on average for a Δ of this length in a random
    direction, √(d/n) ‖Δ‖ and ‖Δ‖² tr F/n. None where every gradient at θ_0 is zero.
    """

    projection: float | None
    expected_projection: float | None
    overlap_score: float | None
    expected_overlap_score: float | None


class SensitiveSubspace:
    """What a backward pass over the completions at θ_0 leaves at every layer: inputs and output gradients, as rows.

    With G_i = Σ_s δ_s x_sᵀ, ⟨g_i, Δ⟩ needs the rows alone: no gradient, no eigenvector and no second visit to θ_0. For rank-r
    factors it costs r(d_in + d_out) a row. Rows are kept on the CPU, in the dtype of the model.
    """

    def __init__(
        self,
        model: Any,
        names: Sequence[str],
        examples: Sequence[Example],
        *,
        energy: float,
        dimension: int | None,
        reduction: Reduction,
        memory: int,
    ) -> None:
        wanted = set(names)
        check_examples(examples)
        self._rows: dict[str, list[Contribution]] = defaultdict(list)
        keep = _Keeper(memory)
        walk(model, find_sites(model)[0], wanted, examples, lambda name, found: self._rows[name].append(keep(found)), reduction=reduction)
        self.bytes = keep.bytes
        gram = fisher_gram(model, examples, wanted=wanted.__contains__, reduction=reduction, memory=memory)
        self.left_out = dict(gram.left_out) | dict.fromkeys(wanted - set(gram.names) - set(gram.left_out), "no layer's gradient")
        self.subspace: SafeSubspace = safe_subspace(gram, energy=energy, dimension=dimension)
        self.examples = len(examples)

    @property
    def names(self) -> tuple[str, ...]:
        return self.subspace.names

    def measured(self, changes: Mapping[str, Change] | Callable[[str], Change], device: torch.device) -> Sensitivity:
        """changes: θ_t − θ_0 by name. Products with float32 rows or wider, sums in float64."""
        take = changes if callable(changes) else changes.__getitem__
        products = torch.zeros(self.examples, dtype=torch.float64)
        length = 0.0
        with full_precision_matmul(device):
            for name in self.names:
                change = take(name)
                products += change.with_gradients(self._rows[name], self.examples)
                length += change.squared_norm()
        return self.of(products, length)

    def of(self, products: Tensor, squared_norm: float) -> Sensitivity:
        """From ⟨g_i, Δ⟩ (n,) and ‖Δ‖²."""
        spectrum, d, entries = self.subspace.spectrum, self.subspace.dimension, self.subspace.parameters
        if d is None:
            return Sensitivity(None, None, None, None)
        return Sensitivity(
            float(projection_norm(spectrum, products, d)),
            (squared_norm * d / entries) ** 0.5,
            float(overlap_scores(products)),
            expected_overlap_score(squared_norm, spectrum.trace, entries),
        )


class _Keeper:
    """Copies contributions to the CPU. Raises RequestError above `memory` bytes."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        # Apart from the memory that the training takes and returns at every step.
        self._arena = Arena(device=torch.device("cpu"))

    @property
    def bytes(self) -> int:
        return self._arena.used

    def __call__(self, found: Contribution) -> Contribution:
        kept = self._arena.keep(found)
        if self.bytes > self._memory:
            raise RequestError(
                f"what the completions leave at the watched layers takes more than {self._memory / 2**30:.3g} GB. Give fewer or shorter completions "
                "(limit, max_length), watch fewer layers (only), or raise memory."
            )
        return kept
