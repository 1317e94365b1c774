"""The LoX edit as the engine asks for it: one matrix hardened, with the manifest's record of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lox_merge.errors import NumericalError
from lox_merge.jobs.device_memory import on_cpu_where_too_large
from lox_merge.jobs.layout import MatrixView
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.select import TensorPlan
from lox_merge.jobs.summary import summarise
from lox_merge.jobs.triplets import TakenNow, TripletSource
from lox_merge.jobs.work import certificate_record, form_delta, form_deltas, matrix_seed, working_memory
from lox_merge.maths.batched_lanczos import Run
from lox_merge.maths.batched_spectral import batched_rank, batched_truncated_svd
from lox_merge.maths.edits import Realised, lox_edit
from lox_merge.maths.grid import Grid
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

    @property
    def computed(self) -> bool:
        return self.realised is not None

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
    has_low_rank = True
    unchanged = "the delta is zero"

    @property
    def requantises(self) -> bool:
        return self.recipe.requantise

    def choose(self, tensor: TensorPlan, problems: list[str]) -> TensorPlan:
        alpha = self.recipe.alpha_for(tensor.name)
        if alpha == 0:
            return TensorPlan(tensor.name, tensor.info, "copy", "alpha 0")
        # Not dataclasses.replace, which takes three times as long: models of 100,000 tensors exist.
        rank = self.recipe.rank_for(tensor.name)
        return TensorPlan(tensor.name, tensor.info, "edit", "", tensor.counterparts, rank, alpha, tensor.views)

    def matrix(
        self,
        sources: Mapping[str, Tensor],
        out: Tensor,
        view: MatrixView,
        tensor: TensorPlan,
        device: torch.device,
        triplets: TripletSource,
        grid: Grid | None = None,
    ) -> MatrixResult:
        return edit_matrix(sources["base"], sources["aligned"], out, view, tensor, self.recipe, device, triplets, grid)

    def batch(
        self,
        sources: Mapping[str, Tensor],
        out: Tensor,
        members: Sequence[tuple[TensorPlan, MatrixView]],
        device: torch.device,
        triplets: TripletSource,
        run: Run,
    ) -> list[MatrixResult]:
        return edit_batch(sources["base"], sources["aligned"], out, members, self.recipe, triplets, run)

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
    grid: Grid | None = None,
) -> MatrixResult:
    """Writes the hardened matrix into `out` (a view of the output tensor); aligned's values for a zero or non-finite delta.

    triplets: where the delta's leading triplets come from; None takes an SVD of it. grid: as in `apply_update`.
    """
    source = triplets or TakenNow(recipe.tolerance, recipe.seed)

    def edit(device: torch.device) -> MatrixResult:
        return _edit(base, aligned, out, view, tensor, recipe, device, source, grid)

    try:
        return on_cpu_where_too_large(edit, device, f"{tensor.name}{view.label} ({list(view.shape)})", "edited")
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
    grid: Grid | None,
) -> MatrixResult:
    base, aligned = base.to(device), aligned.to(device)
    delta, norm, bad = form_delta(base, aligned)
    # On a GPU the result is made there and copied back whole.
    target = out if device.type == "cpu" else torch.empty(out.shape, dtype=out.dtype, device=device)
    matrices = base, aligned, delta, norm, bad, target
    moved = None if grid is None else grid.to(device)
    result = _write(*matrices, view, tensor, recipe, lambda: triplets.subspace(tensor, view, delta, base, aligned), moved)
    if target is not out:
        out.copy_(target)
    return result


def _write(
    base: Tensor,
    aligned: Tensor,
    delta: Tensor,
    norm: float,
    bad: int,
    out: Tensor,
    view: MatrixView,
    tensor: TensorPlan,
    recipe: Recipe,
    subspace: Callable[[], Subspace],
    grid: Grid | None = None,
) -> MatrixResult:
    """Everything on one device. subspace: asked for only where the rule needs triplets."""
    if bad or norm == 0:
        out.copy_(aligned)
        return MatrixResult(view.label, view.shape, bad=bad)
    assert tensor.rank is not None
    _, found, realised = lox_edit(
        base,
        aligned,
        tensor.rank,
        tensor.alpha,
        rounding=recipe.rounding,
        seed=recipe.seed,
        # Every matrix starts its SVD from the same seed, but draws its own rounding noise.
        rounding_seed=matrix_seed(recipe.seed, tensor.name + view.label),
        delta=delta,
        subspace=None if tensor.rank.kind == "full" else subspace(),
        out=out,
        grid=grid,
    )
    return MatrixResult(view.label, view.shape, changed=True, subspace=found, delta_norm=norm, realised=realised)


def edit_batch(
    base: Tensor,
    aligned: Tensor,
    out: Tensor,
    members: Sequence[tuple[TensorPlan, MatrixView]],
    recipe: Recipe,
    triplets: TripletSource,
    run: Run,
) -> list[MatrixResult]:
    """As `edit_matrix`, for matrices (b, d_out, d_in) of one rank rule, all on one device; SVDs together where the rule allows it."""
    try:
        delta, norms, bad = form_deltas(base, aligned)
    except NumericalError as error:
        raise NumericalError(f"{members[0][0].name} or one of its shape in the same shard: {error}.") from error
    rule = members[0][0].rank
    subspaces: list[Subspace] | None = None
    if type(triplets) is TakenNow and rule is not None and batched_rank(members[0][1].shape, rule) is not None:
        usable = [0.0 if count else norm for norm, count in zip(norms, bad, strict=True)]
        try:
            subspaces = batched_truncated_svd(delta, rule, norms=usable, tolerance=triplets.tolerance, seed=triplets.seed, run=run)
        except NumericalError as error:
            raise NumericalError(f"{members[0][0].name} or one of its shape in the same shard: {error}.") from error
    results = []
    for place, (tensor, view) in enumerate(members):

        def subspace(place: int = place, tensor: TensorPlan = tensor, view: MatrixView = view) -> Subspace:
            return triplets.subspace(tensor, view, delta[place], base[place], aligned[place]) if subspaces is None else subspaces[place]

        matrices = base[place], aligned[place], delta[place], norms[place], bad[place], out[place]
        try:
            results.append(_write(*matrices, view, tensor, recipe, subspace))
        except NumericalError as error:
            raise NumericalError(f"tensor {tensor.name}{view.label}: {error}.") from error
    return results
