"""Where the leading singular triplets of a delta come from: an SVD taken now, a file of factors, or that file's SVD again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lox_merge.errors import RequestError
from lox_merge.jobs.factors import Factors
from lox_merge.jobs.layout import MatrixView
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.select import TensorPlan
from lox_merge.maths.precision import rounding_noise_edge
from lox_merge.maths.rank import RankRule
from lox_merge.maths.spectral import truncated_svd
from lox_merge.maths.subspace import Subspace


class TripletSource(Protocol):
    """Gives the triplets that a tensor's rank rule keeps of one delta."""

    def subspace(self, tensor: TensorPlan, view: MatrixView, delta: Tensor, aligned: Tensor) -> Subspace:
        """delta: (d_out, d_in) float32; aligned: the stored matrix, whose dtype says where rounding noise begins."""
        ...

    def record(self) -> dict[str, Any] | None:
        """What decides the triplets beside recipe and sources, for the manifest; None where nothing does."""
        ...


@dataclass(frozen=True)
class TakenNow:
    """A truncated SVD with the recipe's tolerance and seed."""

    recipe: Recipe

    def subspace(self, tensor: TensorPlan, view: MatrixView, delta: Tensor, aligned: Tensor) -> Subspace:
        rule = _rule(tensor)
        edge = rounding_noise_edge(aligned) if rule.kind == "noise-floor" else 0.0
        return truncated_svd(delta, rule, noise_edge=edge, tolerance=self.recipe.tolerance, seed=self.recipe.seed)

    def record(self) -> None:
        return None


@dataclass(frozen=True)
class FromFactors:
    """Triplets of a file of factors: no SVD is spent."""

    factors: Factors

    def subspace(self, tensor: TensorPlan, view: MatrixView, delta: Tensor, aligned: Tensor) -> Subspace:
        found = self.factors.subspace(tensor.name, view.label)
        return _truncated(found, _rule(tensor), view, self.factors.matrices[tensor.name, view.label].noise_edge, delta.device)

    def record(self) -> dict[str, Any]:
        settings = self.factors.document["job"]["recipe"]
        return {key: settings[key] for key in ("rank", "tolerance", "seed")}

    def check(self, edited: list[TensorPlan]) -> None:
        """Raises RequestError where a rank rule needs more triplets than are held, or a matrix was not decomposed."""
        for tensor in edited:
            rule = _rule(tensor)
            if rule.kind == "full":
                continue  # the delta itself, no triplets
            for view in tensor.views:
                if tensor.name + view.label in self.factors.document["non_finite"]:
                    continue  # copied, or refused with its NaN counted, when the delta is formed
                held = self.factors.subspace(tensor.name, view.label)
                record = self.factors.matrices[tensor.name, view.label]
                needed = _kept(held, rule, view, record.noise_edge)
                if not record.complete and (needed is None or needed > held.rank):
                    raise RequestError(
                        f"rank {rule} of {tensor.name}{view.label} needs more than the {held.rank} triplets that {self.factors.path.name} holds. "
                        "Ask for a lower rank, decompose again with a higher --rank, or leave out --factors."
                    )


@dataclass(frozen=True)
class DecomposedAgain:
    """The triplets that a file of factors held, from the sources: what `FromFactors.record` says decides them."""

    rank: int
    tolerance: float
    seed: int

    def subspace(self, tensor: TensorPlan, view: MatrixView, delta: Tensor, aligned: Tensor) -> Subspace:
        found = truncated_svd(delta, self.rank, tolerance=self.tolerance, seed=self.seed)
        return _truncated(found, _rule(tensor), view, rounding_noise_edge(aligned), delta.device)

    def record(self) -> dict[str, Any]:
        return {"rank": str(self.rank), "tolerance": self.tolerance, "seed": self.seed}


def recorded_triplets(record: dict[str, Any] | None, recipe: Recipe) -> TripletSource:
    """The source that makes the triplets of a manifest again, from the `record` in it."""
    if record is None:
        return TakenNow(recipe)
    return DecomposedAgain(int(record["rank"]), float(record["tolerance"]), int(record["seed"]))


def _truncated(found: Subspace, rule: RankRule, view: MatrixView, noise_edge: float, device: torch.device) -> Subspace:
    kept = _kept(found, rule, view, noise_edge)
    part = found if kept is None else found.truncate(min(kept, found.rank))
    # One memory layout wherever the triplets come from: products of another layout add in another order.
    return replace(part, left=part.left.to(device).contiguous(), right=part.right.to(device).contiguous())


def _kept(found: Subspace, rule: RankRule, view: MatrixView, noise_edge: float) -> int | None:
    """k by the rule; None where the spectrum decides and all of `found` is kept, perhaps more."""
    wanted = rule.from_shape(min(view.shape))
    return rule.from_spectrum(found.singular_values.square(), found.norm**2, noise_edge) if wanted is None else wanted


def _rule(tensor: TensorPlan) -> RankRule:
    assert tensor.rank is not None, "only tensors to be edited have triplets"
    return tensor.rank
