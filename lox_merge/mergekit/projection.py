"""The merge method `lox_project` for mergekit: the projection filter of lox_merge.maths.filter, per matrix.

`base_model` is the pre-trained model; of the two other models one says `role: aligned` and one `role: finetuned` among its
parameters. Source: "Safety subspaces are not distinct" (Ponkshe et al. 2025), Eqs. 5 and 6.

Parameters, with mergekit's filters and gradients:
role      'aligned' or 'finetuned', in the entry of each model beside base_model.
fraction  number in [0, 1): k = max(1, round(f · short side)). 0 (default) leaves the tensor as fine-tuned, unless rank is given.
rank      whole number: k itself, instead of a fraction.
mode      'orthogonal' (default) or 'parallel'. basis: 'top' (default), 'random-k' or 'random'. side: 'left' (default) or 'right'.
rounding  'nearest' (default), 'feedback' or 'stochastic'.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from mergekit.merge_methods import (
    BasePolicy,
    InputContract,
    MergeMethod,
    OptionalTensorPolicy,
    PerNonBase,
    TensorGroup,
    merge_method,
)
from pydantic import BeforeValidator
from torch import Tensor

from lox_merge.checkpoint.dtypes import code_of
from lox_merge.checkpoint.safetensors_format import TensorInfo
from lox_merge.errors import NonFiniteDeltaError, RecipeError
from lox_merge.jobs.filter_edit import FilterEdit
from lox_merge.jobs.filter_recipe import FilterRecipe
from lox_merge.jobs.layout import MatrixView, is_vector, matrix_views
from lox_merge.jobs.select import TensorPlan
from lox_merge.jobs.triplets import TakenNow
from lox_merge.maths.directions import BASES
from lox_merge.maths.filter import MODES
from lox_merge.maths.rounding import ROUNDINGS
from lox_merge.mergekit.realised import model_config, report_realised

PROJECT_METHOD = "lox_project"
PROJECT_REFERENCE = "https://arxiv.org/abs/2505.14185"
ROLES = ("aligned", "finetuned")


def _one_of(name: str, allowed: tuple[str, ...]) -> BeforeValidator:
    def check(value: Any) -> str:
        if value not in allowed:
            raise RecipeError(f"{name} {value!r} is not known; use one of {', '.join(allowed)}.")
        return str(value)

    return BeforeValidator(check)


def _check_fraction(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not 0 <= value < 1:
        raise RecipeError(f"fraction {value!r} is not a number in [0, 1); 0 leaves a tensor as fine-tuned.")
    return float(value)


def _check_rank(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise RecipeError(f"rank {value!r} is not a whole number ≥ 0 (0: none is given).")
    return round(value)  # gradients interpolate


Role = Annotated[str, _one_of("role", ROLES)]
Fraction = Annotated[float, BeforeValidator(_check_fraction)]
GivenRank = Annotated[int, BeforeValidator(_check_rank)]
ModeName = Annotated[str, _one_of("mode", MODES)]
BasisName = Annotated[str, _one_of("basis", BASES)]
SideName = Annotated[str, _one_of("side", ("left", "right"))]
RoundingName = Annotated[str, _one_of("rounding", ROUNDINGS)]


def project_kernel(
    group: TensorGroup,
    role: PerNonBase[Role],
    fraction: Fraction = 0.0,
    rank: GivenRank = 0,
    mode: ModeName = "orthogonal",
    basis: BasisName = "top",
    side: SideName = "left",
    rounding: RoundingName = "nearest",
) -> Tensor:
    """One output tensor, bit for bit that of `lox-merge project`. Inputs and output have one shape and one dtype (mergekit promotes
    the inputs to it). Raises NonFiniteDeltaError, and RecipeError where the roles are not one each or fraction and rank are both given."""
    entries = {role[entry.id]: entry for entry in group.non_base}
    if set(entries) != set(ROLES):
        raise RecipeError("lox_project needs one model with role: aligned and one with role: finetuned beside base_model.")
    stored = {"base": group.base.tensor.contiguous(), **{name: entry.tensor.contiguous() for name, entry in entries.items()}}
    finetuned: Tensor = stored["finetuned"]
    if (fraction == 0 and rank == 0) or finetuned.numel() == 0 or finetuned.ndim == 0:
        return finetuned
    recipe = FilterRecipe(
        mode=mode,  # type: ignore[arg-type]
        fraction=fraction or None,
        rank=rank or None,
        basis=basis,  # type: ignore[arg-type]
        side=side,  # type: ignore[arg-type]
        rounding=rounding,  # type: ignore[arg-type]
    )
    name, shape = group.metadata.name or "tensor", tuple(finetuned.shape)
    views = [MatrixView((finetuned.numel(), 1))] if is_vector(shape) else matrix_views(name, shape, model_config(entries["finetuned"].id))
    info = TensorInfo(name, code_of(finetuned.dtype), shape, 0, 0)
    edit, problems = FilterEdit(recipe), list[str]()
    job = edit.choose(TensorPlan(name, info, "edit", views=tuple(views)), problems)
    if problems:
        raise RecipeError(problems[0])
    out: Tensor = finetuned.clone()
    triplets = TakenNow(recipe.tolerance, recipe.seed)
    results = []
    for view in views:
        sources = {source: view.select(tensor) for source, tensor in stored.items()}
        results.append(edit.matrix(sources, view.select(out), view, job, finetuned.device, triplets))
    if any(result.bad for result in results):
        raise NonFiniteDeltaError({name: sum(result.bad for result in results)})
    report_realised([(name, result.realised) for result in results if result.realised is not None])
    return out


PROJECT: MergeMethod = merge_method(
    project_kernel,
    name=PROJECT_METHOD,
    pretty_name="Projection filter (alignment subspace)",
    reference_url=PROJECT_REFERENCE,
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=2, max_non_base=2),
    # An optional tensor that one model has alone is copied; preflight finds the ones that two have.
    optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_SINGLETON,
)
