"""The LoX edit as the engine asks for it: one matrix hardened, with the manifest's record of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lox_merge.errors import LoxMergeWarning, NumericalError
from lox_merge.jobs.layout import MatrixView
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.select import TensorPlan
from lox_merge.jobs.summary import summarise
from lox_merge.jobs.triplets import TakenNow, TripletSource
from lox_merge.jobs.work import certificate_record, form_delta, matrix_seed, working_memory
from lox_merge.maths.edits import Realised, lox_edit
from lox_merge.maths.subspace import Subspace


@dataclass(frozen=True)
class MatrixResult:
    """What was done to one matrix. bad: number of NaN and Inf in its delta (then nothing else holds)."""

    label: str
    shape: tuple[int, int]
    bad: int = 0
    changed: bool = False
    subspace: Subspace | None = None
    delta_norm: float = 0.0
    realised: Realised | None = None

    def to_json(self) -> dict[str, Any]:
        """The manifest's record. Undefined values are null."""
        record: dict[str, Any] = {"part": self.label, "shape": list(self.shape), "delta_norm": self.delta_norm}
        if not self.changed:
            return record | {"rank": 0, "singular_values": [], "r_align": None, "certificate": None, "realised": None}
        subspace, realised = self.subspace, self.realised
        record["rank"] = "full" if subspace is None else subspace.rank
        record["singular_values"] = None if subspace is None else subspace.singular_values.tolist()
        record["r_align"] = 1.0 if subspace is None else subspace.alignment_ratio
        if subspace is None:
            record["certificate"] = None
        else:
            record["certificate"] = certificate_record(subspace.certificate)
        assert realised is not None
        record["realised"] = {
            "gain": realised.gain,
            "cosine": realised.cosine,
            "intended_norm": realised.intended_norm,
            "realised_norm": realised.realised_norm,
        }
        return record


@dataclass(frozen=True)
class LoxEdit:
    """W_align + alpha · Proj_k(W_align − W_base); see jobs.edit.Edit for the methods."""

    recipe: Recipe
    method = "lox"
    roles = ("base", "aligned")
    edits_vectors = False
    unchanged = "the delta is zero"

    def choose(self, tensor: TensorPlan, problems: list[str]) -> TensorPlan:
        alpha = self.recipe.alpha_for(tensor.name)
        if alpha == 0:
            return TensorPlan(tensor.name, tensor.info, "copy", "alpha 0")
        # Not dataclasses.replace, which takes three times as long: models of 100,000 tensors exist.
        rank = self.recipe.rank_for(tensor.name)
        return TensorPlan(tensor.name, tensor.info, "edit", "", tensor.counterparts, rank, alpha, tensor.views)

    def matrix(
        self, sources: Mapping[str, Tensor], out: Tensor, view: MatrixView, tensor: TensorPlan, device: torch.device, triplets: TripletSource
    ) -> MatrixResult:
        return edit_matrix(sources["base"], sources["aligned"], out, view, tensor, self.recipe, device, triplets)

    def working_memory(self, shape: tuple[int, int], tensor: TensorPlan) -> int:
        assert tensor.rank is not None
        return working_memory(shape, tensor.rank)

    def trial(self, tensor: TensorPlan, base: Tensor, aligned: Tensor) -> None:
        assert tensor.rank is not None
        lox_edit(base, aligned, tensor.rank, 1.0)

    def tensor_record(self, tensor: TensorPlan) -> dict[str, Any]:
        return {"rank_rule": str(tensor.rank), "alpha": tensor.alpha}

    def summary(self, tensors: list[dict[str, Any]]) -> dict[str, Any]:
        return asdict(summarise(tensors))


def edit_matrix(
    base: Tensor,
    aligned: Tensor,
    out: Tensor,
    view: MatrixView,
    tensor: TensorPlan,
    recipe: Recipe,
    device: torch.device,
    triplets: TripletSource | None = None,
) -> MatrixResult:
    """Writes the hardened matrix into `out` (a view of the output tensor); aligned's values for a zero or non-finite delta.

    triplets: where the delta's leading triplets come from; None takes an SVD of it.
    """
    source = triplets or TakenNow(recipe.tolerance, recipe.seed)
    try:
        return _edit(base, aligned, out, view, tensor, recipe, device, source)
    except torch.cuda.OutOfMemoryError:
        warnings.warn(
            f"{tensor.name}{view.label} ({list(view.shape)}) did not fit on {device}; it was edited on the CPU", LoxMergeWarning, stacklevel=2
        )
        return _edit(base, aligned, out, view, tensor, recipe, torch.device("cpu"), source)
    except NumericalError as error:
        raise NumericalError(f"tensor {tensor.name}{view.label}: {error}.") from error


def _edit(
    base: Tensor,
    aligned: Tensor,
    out: Tensor,
    view: MatrixView,
    tensor: TensorPlan,
    recipe: Recipe,
    device: torch.device,
    triplets: TripletSource,
) -> MatrixResult:
    base, aligned = base.to(device), aligned.to(device)
    delta, norm, bad = form_delta(base, aligned)
    if bad:
        out.copy_(aligned)
        return MatrixResult(view.label, view.shape, bad=bad)
    if norm == 0:
        out.copy_(aligned)
        return MatrixResult(view.label, view.shape)
    assert tensor.rank is not None
    # On a GPU the result is made there and copied back whole.
    target = out if device.type == "cpu" else torch.empty(out.shape, dtype=out.dtype, device=device)
    _, subspace, realised = lox_edit(
        base,
        aligned,
        tensor.rank,
        tensor.alpha,
        rounding=recipe.rounding,
        seed=recipe.seed,
        # Every matrix starts its SVD from the same seed, but draws its own rounding noise.
        rounding_seed=matrix_seed(recipe.seed, tensor.name + view.label),
        delta=delta,
        subspace=None if tensor.rank.kind == "full" else triplets.subspace(tensor, view, delta, aligned),
        out=target,
    )
    if target is not out:
        out.copy_(target)
    return MatrixResult(view.label, view.shape, changed=True, subspace=subspace, delta_norm=norm, realised=realised)
