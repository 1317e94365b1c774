"""R_ft and R_align: how much of a model's change from the base lies in the leading directions of its alignment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lox_merge.jobs.layout import MatrixView
from lox_merge.jobs.plan import Plan
from lox_merge.safety.placement import place


@dataclass(frozen=True)
class Ratio:
    """‖Proj_k(D)‖_F/‖D‖_F with D = W − W_base. mean: over matrices; energy: of all energies together. None where D = 0.

    matrices: how many enter.
    """

    mean: float | None
    energy: float | None
    matrices: int


@dataclass(frozen=True)
class _Matrix:
    target: str
    base_name: str
    view: MatrixView
    basis: Tensor
    """(d_out, k) left singular vectors of Delta_align; right ones, (d_in, k), where a module stores its transpose."""
    transposed: bool


class Dispersion:
    """The leading k directions U_k of Delta_align per linear layer, and R of any model of the same shape (LoX, Eqs. 1 and 2).

    k: the plan's. Over the plan's matrices that are the weight of an nn.Linear (or GPT-2's Conv1D, which stores the transpose), as
    the authors average; embeddings and stacked experts are left out. U_k is that of aligned for every model, so that all are
    measured against the same directions. Rank 'full' has no leading directions: R is None then.
    """

    def __init__(self, model: Any, plan: Plan) -> None:
        edited = {tensor.name: tensor for tensor in plan.edited}
        self._plan, self._matrices = plan, list[_Matrix]()
        for group in place(model, plan.aligned.names)[0]:
            tensor = edited.get(group.sources[0][0]) if group.plain else None
            module = model.get_submodule(group.target.rpartition(".")[0])
            kind = type(module).__name__
            if tensor is None or tensor.rank is None or tensor.rank.kind == "full" or not (isinstance(module, torch.nn.Linear) or kind == "Conv1D"):
                continue
            for view in tensor.views:
                aligned = view.select(plan.aligned.tensor(tensor.name).contiguous())
                base = view.select(plan.base.tensor(tensor.base_name).contiguous())
                delta = aligned.float() - base.float()
                if bool(torch.isfinite(delta).all()) and bool(delta.any()):
                    subspace = plan.triplets.subspace(tensor, view, delta.to(model.device), base, aligned)
                    basis = (subspace.right if kind == "Conv1D" else subspace.left).cpu()
                    self._matrices.append(_Matrix(group.target, tensor.base_name, view, basis, kind == "Conv1D"))

    @torch.no_grad()
    def ratio(self, model: Any) -> Ratio:
        """R of the weights as they are now, adapters of LoRA included."""
        kept, whole = [], []
        for matrix in self._matrices:
            weight = matrix.view.select(_weight(model, matrix.target).float().contiguous())
            change = weight - self._base(matrix.base_name, matrix.view, weight.device)
            basis = matrix.basis.to(weight.device)
            projected = change @ basis if matrix.transposed else basis.T @ change
            kept.append(float(projected.double().square().sum()))
            whole.append(float(change.double().square().sum()))
        ratios = [math.sqrt(part / total) for part, total in zip(kept, whole, strict=True) if total]
        return Ratio(
            mean=sum(ratios) / len(ratios) if ratios else None,
            energy=math.sqrt(sum(kept) / sum(whole)) if ratios else None,
            matrices=len(ratios),
        )

    def _base(self, name: str, view: MatrixView, device: torch.device) -> Tensor:
        return view.select(self._plan.base.tensor(name).float().contiguous()).to(device)


def _weight(model: Any, target: str) -> Tensor:
    """A parameter as it acts: with the products of its active LoRA adapters added."""
    path, _, leaf = target.rpartition(".")
    module = model.get_submodule(path)
    if not hasattr(module, "base_layer"):
        weight: Tensor = getattr(module, leaf)
        return weight
    total: Tensor = getattr(module.base_layer, leaf)
    for adapter in module.active_adapters:
        total = total + module.get_delta_weight(adapter)
    return total
