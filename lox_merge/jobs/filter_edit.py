"""The projection filter as the engine asks for it: base, aligned and fine-tuned matrix in, filtered matrix out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lox_merge.errors import NumericalError
from lox_merge.jobs.device_memory import on_cpu_where_too_large
from lox_merge.jobs.filter_recipe import FilterRecipe
from lox_merge.jobs.filter_record import FilterOutcome, filter_figures, summarise_filter
from lox_merge.jobs.layout import MatrixView, is_vector
from lox_merge.jobs.select import TensorPlan
from lox_merge.jobs.triplets import FromFactors, TakenNow, TripletSource
from lox_merge.jobs.work import form_delta, matrix_seed, working_memory
from lox_merge.maths.batched_lanczos import Run
from lox_merge.maths.directions import Directions, needs_dense, of_subspace
from lox_merge.maths.filter import Decision, Projection, find_directions, project_by_delta, project_on, write_filtered, write_merged
from lox_merge.maths.grid import Grid
from lox_merge.maths.rank import RankRule
from lox_merge.maths.subspace import Side

WHOLE = RankRule("full")


@dataclass(frozen=True)
class FilterEdit:
    """W_align + P(Δ_ft), or W_align + Δ_ft − P(Δ_ft); see jobs.edit.Edit for the methods.

    least_similar: names (tensor and part) of the matrices that `recipe.layers` selects, once they are known.
    """

    recipe: FilterRecipe
    least_similar: frozenset[str] | None = field(default=None, compare=False)
    method = "project"
    roles = ("base", "aligned", "finetuned")
    unchanged = "the fine-tuning delta is zero"
    requantises = False
    has_low_rank = False  # the fine-tuned update is of any rank

    @property
    def edits_vectors(self) -> bool:
        # Safe LoRA decides layer by layer, and its layers are matrices.
        return not self.recipe.by_layer and self.recipe.projector == "subspace"

    def choose(self, tensor: TensorPlan, problems: list[str]) -> TensorPlan:
        if not tensor.views:
            return TensorPlan(tensor.name, tensor.info, "copy", "no matrix")
        if is_vector(tensor.info.shape):
            return replace(tensor, rank=RankRule("fixed", 1))
        shape = tensor.views[0].shape  # parts of one tensor have one shape
        rank = self.recipe.rank_for(shape)
        if rank is not None and rank > min(shape):
            problems.append(
                f"rank {rank} is above the short side of {tensor.name} ({list(shape)}). Ask for at most {min(shape)}, "
                "give a fraction instead, or leave the tensor out with --exclude."
            )
        return replace(tensor, rank=WHOLE if rank is None else RankRule("fixed", rank))

    def matrix(
        self,
        sources: Mapping[str, Tensor],
        out: Tensor,
        view: MatrixView,
        tensor: TensorPlan,
        device: torch.device,
        triplets: TripletSource,
        grid: Grid | None = None,
    ) -> FilterOutcome:
        assert grid is None, "the filter writes plain weights only"

        def edit(device: torch.device) -> FilterOutcome:
            return self._matrix(sources, out, view, tensor, device, triplets)

        try:
            return on_cpu_where_too_large(edit, device, f"{tensor.name}{view.label} ({list(view.shape)})", "edited")
        except NumericalError as error:
            raise NumericalError(f"tensor {tensor.name}{view.label}: {error}.") from error

    def batch(
        self,
        sources: Mapping[str, Tensor],
        out: Tensor,
        members: Sequence[tuple[TensorPlan, MatrixView]],
        device: torch.device,
        triplets: TripletSource,
        run: Run,
    ) -> list[FilterOutcome]:
        outcomes = []
        for place, (tensor, view) in enumerate(members):
            matrices = {role: stacked[place] for role, stacked in sources.items()}
            try:
                outcomes.append(self._matrix(matrices, out[place], view, tensor, device, triplets))
            except NumericalError as error:
                raise NumericalError(f"tensor {tensor.name}{view.label}: {error}.") from error
        return outcomes

    def _matrix(
        self, sources: Mapping[str, Tensor], out: Tensor, view: MatrixView, tensor: TensorPlan, device: torch.device, triplets: TripletSource
    ) -> FilterOutcome:
        recipe, name = self.recipe, tensor.name + view.label
        base, aligned, finetuned = (sources[role].to(device) for role in self.roles)
        delta, norm, bad = form_delta(base, aligned)
        change, change_norm, bad_change = form_delta(aligned, finetuned, slot=1)
        if bad or bad_change or change_norm == 0:
            out.copy_(finetuned)
            return FilterOutcome(view.label, view.shape, bad=bad + bad_change)
        directions, projection = self.project(delta, change, base, aligned, view, tensor, triplets)
        decision = self._decide(name, projection)
        realised = None
        target = out if device.type == "cpu" else torch.empty(out.shape, dtype=out.dtype, device=device)
        # Every matrix draws its own rounding noise.
        settings: dict[str, Any] = {"rounding": recipe.rounding, "seed": matrix_seed(recipe.seed, name), "out": target}
        if decision == "kept":
            target.copy_(finetuned)
        elif decision == "merged":
            assert recipe.merge_weight is not None
            _, realised = write_merged(aligned, change, recipe.merge_weight, **settings)
        else:
            assert recipe.mode is not None
            _, realised = write_filtered(aligned, finetuned, projection, recipe.mode, **settings)
        if target is not out:
            out.copy_(target)
        figures = filter_figures(norm, decision, directions, projection, realised)
        return FilterOutcome(view.label, view.shape, changed=True, record=figures, realised=realised)

    def project(
        self, delta: Tensor, change: Tensor, base: Tensor, aligned: Tensor, view: MatrixView, tensor: TensorPlan, triplets: TripletSource
    ) -> tuple[Directions | None, Projection]:
        """P(Δ_ft) of one matrix and the directions of P (None for the authors' Safe LoRA projector). delta, change: float32."""
        side = stored_side(self.recipe.side, view, tensor)
        if self.recipe.projector == "safe-lora":
            return None, project_by_delta(delta, change, side)
        assert tensor.rank is not None
        rank, seed = int(tensor.rank.value), self.recipe.seed
        if self.recipe.basis != "top":
            directions = find_directions(delta, rank, self.recipe.basis, side, seed=direction_seed(seed, tensor.name + view.label))
        elif is_vector(tensor.info.shape) or (isinstance(triplets, TakenNow) and needs_dense(*view.shape, rank)):
            directions = find_directions(delta, rank, "top", side, tolerance=self.recipe.tolerance, seed=seed)
        else:
            directions = of_subspace(triplets.subspace(tensor, view, delta, base, aligned), side)
        return directions, project_on(directions, change, side)

    def _decide(self, name: str, projection: Projection) -> Decision:
        below: Decision = "merged" if self.recipe.below == "merge" else "filtered"
        if self.recipe.threshold is not None:
            # Nothing of the update lies in the subspace: as dissimilar as can be.
            return below if projection.cosine is None or projection.cosine <= self.recipe.threshold else "kept"
        if self.recipe.layers is not None:
            assert self.least_similar is not None, "the least similar layers are found before the run"
            return below if name in self.least_similar else "kept"
        return below

    def working_memory(self, shape: tuple[int, int], tensor: TensorPlan) -> int:
        assert tensor.rank is not None
        rows, columns = shape
        short, long = sorted(shape)
        if tensor.rank.kind == "full":
            return 4 * (3 * rows * columns + short * short)
        k = int(tensor.rank.value)
        factors = 4 * (2 * k * (rows + columns) + rows * columns)
        if self.recipe.basis == "random":
            return 4 * rows * columns + factors
        if self.recipe.basis == "random-k" or needs_dense(rows, columns, k):
            return 4 * rows * columns + factors + 8 * (4 * short * short + long * k)
        return working_memory(shape, tensor.rank) + factors

    def trial(self, tensor: TensorPlan, base: Tensor, aligned: Tensor) -> None:
        view = MatrixView((aligned.shape[0], aligned.shape[1]))
        given = self.recipe.rank_for(view.shape)
        rank = WHOLE if given is None else RankRule("fixed", min(given, *view.shape))
        finetuned = aligned + 1e-3 * base
        sources = {"base": base, "aligned": aligned, "finetuned": finetuned}
        plain = FilterEdit(replace(self.recipe, layers=None, below="project", merge_weight=None, threshold=None))
        tried = replace(tensor, rank=rank, info=replace(tensor.info, shape=view.shape))
        plain.matrix(sources, torch.empty_like(finetuned), view, tried, torch.device("cpu"), TakenNow(self.recipe.tolerance, self.recipe.seed))

    def tensor_record(self, tensor: TensorPlan) -> dict[str, Any]:
        return {"rank_rule": str(tensor.rank), "stored": "rows are inputs" if any(view.transposed for view in tensor.views) else "rows are outputs"}

    def summary(self, tensors: list[dict[str, Any]]) -> dict[str, Any]:
        return asdict(summarise_filter(tensors))


def stored_side(side: Side, view: MatrixView, tensor: TensorPlan) -> Side:
    """The side of the stored matrix that is the layer's output ('left') or input ('right'). A vector has one side only."""
    if is_vector(tensor.info.shape):
        return "left"
    if view.transposed:
        return "right" if side == "left" else "left"
    return side


def direction_seed(seed: int, matrix: str) -> int:
    """Seed of a matrix's random directions, other than that of its rounding noise."""
    return matrix_seed(seed, f"directions:{matrix}")


def check_factors(held: FromFactors, edited: list[TensorPlan]) -> None:
    """Raises RequestError where a file of factors cannot give the directions."""
    held.check([tensor for tensor in edited if not is_vector(tensor.info.shape)])
