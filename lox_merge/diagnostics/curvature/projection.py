"""The paper's projected overlap score: gradients and weight differences through one Rademacher matrix a module, never held whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lox_merge.diagnostics.curvature.sites import Site
from lox_merge.diagnostics.places import layer_of
from lox_merge.maths.rademacher import add_projection, projected_scores

DIMENSIONS = 4096
_LINEAR = ("linear", "conv1d", "experts")


class Projection:
    """Collects R_s vec(g_i) of every linear layer's matrix inside the layers, for several seeds s.

    Give `rows_seen` to `fisher_gram`. It keeps 4 · n · dimensions bytes a matrix and seed.
    """

    def __init__(self, sites: Sequence[Site], dimensions: int, seeds: Sequence[int]) -> None:
        self.dimensions, self.seeds = dimensions, tuple(seeds)
        self._transposed = {name: _is_transposed(site) for site in sites for name in _matrices(site)}
        self._sums: dict[str, list[Tensor]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._sums)

    def rows_seen(self, name: str, first: int, rows: Tensor) -> None:
        if name not in self._transposed:
            return
        if name not in self._sums:
            self._sums[name] = [torch.zeros(len(rows), self.dimensions, device=rows.device) for _ in self.seeds]
        for seed, out in zip(self.seeds, self._sums[name], strict=True):
            add_projection(out, rows, name, first, seed)

    def scores(self, name: str, change: Tensor) -> dict[str, list[float]]:
        """'plain': the paper's OS for each seed; 'unbiased': without the mean of its noise. change: ΔW as the model stores it."""
        matrix = change.transpose(-1, -2) if self._transposed[name] else change
        rows = matrix.reshape(1, -1, matrix.shape[-1]).float()
        found = []
        for seed, gradients in zip(self.seeds, self._sums[name], strict=True):
            out = torch.zeros(1, self.dimensions, device=rows.device)
            add_projection(out, rows, name, 0, seed)
            found.append(projected_scores(gradients, out[0].to(gradients.device)))
        return {"plain": [plain for plain, _ in found], "unbiased": [unbiased for _, unbiased in found]}


def _matrices(site: Site) -> list[str]:
    if site.kind not in _LINEAR:
        return []
    own: dict[str, Any] = dict(site.module.named_parameters(recurse=False))
    smallest = 3 if site.kind == "experts" else 2
    return [name for leaf, name in site.parameters.items() if own[leaf].ndim >= smallest and layer_of(name) is not None]


def _is_transposed(site: Site) -> bool:
    return site.kind == "conv1d" or (site.kind == "experts" and bool(site.module.is_transposed))
