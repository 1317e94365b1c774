"""Where the leading singular triplets of a delta come from: an SVD taken now, an adapter, a file of factors, or that file's SVD again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lox_merge.checkpoint.adapter import AdaptedCheckpoint
from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.errors import RequestError
from lox_merge.jobs.factors import Factors
from lox_merge.jobs.layout import MatrixView
from lox_merge.jobs.noise import PLAIN, PairNoise
from lox_merge.jobs.select import TensorPlan
from lox_merge.jobs.settings import Settings
from lox_merge.maths.factored import factored_svd
from lox_merge.maths.precision import full_precision_matmul
from lox_merge.maths.rank import RankRule
from lox_merge.maths.spectral import truncated_svd
from lox_merge.maths.subspace import Subspace

# Triplets in float32 agree with their delta to about 1e-6, on any device and number of threads; the tolerance of an SVD is 1e-3.
_SAME = 1e-3


class TripletSource(Protocol):
    """Gives the triplets that a tensor's rank rule keeps of one delta."""

    def subspace(self, tensor: TensorPlan, view: MatrixView, delta: Tensor, base: Tensor, aligned: Tensor) -> Subspace:
        """delta: (d_out, d_in) float32; base, aligned: the matrices as they are read, whose rounding says where noise begins."""
        ...

    def record(self) -> dict[str, Any] | None:
        """What decides the triplets beside recipe and sources, for the manifest; None where nothing does."""
        ...


@dataclass(frozen=True)
class TakenNow:
    """A truncated SVD with a recipe's tolerance and seed. noise: of the pair; None for plain matrices that are of no checkpoint."""

    tolerance: float
    seed: int
    noise: PairNoise | None = None

    def subspace(self, tensor: TensorPlan, view: MatrixView, delta: Tensor, base: Tensor, aligned: Tensor) -> Subspace:
        rule = _rule(tensor)
        edge = 0.0
        if rule.kind == "noise-floor":
            edge = (PLAIN if self.noise is None else self.noise.of(tensor, view)).edge(base, aligned, delta)
        return truncated_svd(delta, rule, noise_edge=edge, tolerance=self.tolerance, seed=self.seed)

    def record(self) -> None:
        return None


@dataclass(frozen=True)
class FromAdapter:
    """Exact triplets of an adapter's own factors: the delta is of low rank by construction, no SVD of a weight is spent."""

    adapted: AdaptedCheckpoint
    otherwise: TakenNow

    def subspace(self, tensor: TensorPlan, view: MatrixView, delta: Tensor, base: Tensor, aligned: Tensor) -> Subspace:
        factors = self.adapted.factors(tensor.name_in(self.adapted.role), view.expert)
        if factors is None:  # a tensor that the adapter holds whole (modules_to_save)
            return self.otherwise.subspace(tensor, view, delta, base, aligned)
        left, right = factors
        if view.part is not None:
            piece = slice(*view.part)
            left, right = (left[piece], right) if view.axis == 0 else (left, right[piece])
        return factored_svd(left.to(delta.device), right.to(delta.device), _rule(tensor))

    def record(self) -> None:
        return None


def usual_triplets(base: Checkpoint, aligned: Checkpoint, recipe: Settings) -> TripletSource:
    """Where triplets come from unless a file of factors is given."""
    taken = TakenNow(recipe.tolerance, recipe.seed, PairNoise(base, aligned))
    return FromAdapter(aligned, taken) if isinstance(aligned, AdaptedCheckpoint) else taken


@dataclass(frozen=True)
class FromFactors:
    """Triplets of a file of factors: no SVD is spent."""

    factors: Factors

    def subspace(self, tensor: TensorPlan, view: MatrixView, delta: Tensor, base: Tensor, aligned: Tensor) -> Subspace:
        found = self.factors.subspace(tensor.name, view.label)
        kept = _truncated(found, _rule(tensor), view, self.factors.matrices[tensor.name, view.label].noise_edge, delta.device)
        if not spans_part_of(delta, kept):
            raise RequestError(
                f"{self.factors.path.name} does not hold singular triplets of the delta of {tensor.name}{view.label}: it was changed since it was "
                "made, and what it holds could weaken the model. Make it again: lox-merge decompose BASE ALIGNED FILE --overwrite"
            )
        return kept

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
    noise: PairNoise

    def subspace(self, tensor: TensorPlan, view: MatrixView, delta: Tensor, base: Tensor, aligned: Tensor) -> Subspace:
        found = truncated_svd(delta, self.rank, tolerance=self.tolerance, seed=self.seed)
        return _truncated(found, _rule(tensor), view, self.noise.of(tensor, view).edge(base, aligned, delta), delta.device)

    def record(self) -> dict[str, Any]:
        return {"rank": str(self.rank), "tolerance": self.tolerance, "seed": self.seed}


def recorded_triplets(record: dict[str, Any] | None, base: Checkpoint, aligned: Checkpoint, recipe: Settings) -> TripletSource:
    """The source that makes the triplets of a manifest again, from the `record` in it."""
    if record is None or isinstance(aligned, AdaptedCheckpoint):  # an adapter's triplets are exact, from a file or not
        return usual_triplets(base, aligned, recipe)
    return DecomposedAgain(int(record["rank"]), float(record["tolerance"]), int(record["seed"]), PairNoise(base, aligned))


def _truncated(found: Subspace, rule: RankRule, view: MatrixView, noise_edge: float, device: torch.device) -> Subspace:
    kept = _kept(found, rule, view, noise_edge)
    part = found if kept is None else found.truncate(min(kept, found.rank))
    # One memory layout wherever the triplets come from: products of another layout add in another order.
    return replace(part, left=part.left.to(device).contiguous(), right=part.right.to(device).contiguous())


def spans_part_of(delta: Tensor, subspace: Subspace) -> bool:
    """Whether U is orthonormal and V S = ΔᵀU, V with columns of norm 1: then U S Vᵀ = U Uᵀ Δ, an edit along the delta and none against it.
    Or the same with the sides changed: block Lanczos gives it on the short side, whatever the tolerance left of the other residual.

    One product with the delta or two, a fifth of what an SVD takes at most. Files of factors come from elsewhere, and nothing else compares
    them with the weights before an edit is written.
    """
    if subspace.rank == 0:
        return True
    values = subspace.singular_values.to(delta.device)
    return _projects(delta, subspace.left, values, subspace.right) or _projects(delta.T, subspace.right, values, subspace.left)


def _projects(delta: Tensor, inner: Tensor, values: Tensor, outer: Tensor) -> bool:
    """Whether `inner` is orthonormal and outer · values = deltaᵀ inner, `outer` with columns of norm 1."""
    with full_precision_matmul(delta.device):
        image = (inner.T @ delta).T.double()
        gram = (inner.T @ inner).double()
    apart = (image - outer.double() * values).norm()
    skew = (gram - torch.eye(len(values), dtype=torch.float64, device=delta.device)).abs().max()
    uneven = (outer.double().norm(dim=0) - 1).abs().max()
    # Not >, or NaN would pass.
    return bool(((apart <= _SAME * values.norm()) & (skew <= _SAME) & (uneven <= _SAME)).item())


def _kept(found: Subspace, rule: RankRule, view: MatrixView, noise_edge: float) -> int | None:
    """k by the rule; None where the spectrum decides and all of `found` is kept, perhaps more."""
    wanted = rule.from_shape(min(view.shape))
    return rule.from_spectrum(found.singular_values.square(), found.norm**2, noise_edge) if wanted is None else wanted


def _rule(tensor: TensorPlan) -> RankRule:
    assert tensor.rank is not None, "only tensors to be edited have triplets"
    return tensor.rank
