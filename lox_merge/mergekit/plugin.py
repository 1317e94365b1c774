"""The merge method `lox` for mergekit: aligned + alpha · Proj_rank(aligned − base), per matrix.

`base_model` is the pre-trained model, as for mergekit's task arithmetic; the one other model is the aligned one.
Importing this module registers the method; mergekit has no plugin hook, so plain `mergekit-yaml` cannot find it and
`lox-merge yaml` imports it first. Source: LoX, Perin et al. 2025, arXiv 2506.15606, Eq. 3.

Parameters (in `parameters:` of the configuration, or of the aligned model's entry), with mergekit's filters and gradients:
rank      whole number (default 6), 'full', '10%', 'energy:0.9' or 'noise-floor'. A gradient over numbers is rounded to the
          nearest whole number per layer, one over texts picks the nearest lower step. 0 leaves the tensor as in aligned.
alpha     finite number ≥ 0 (default 1.25). 0 leaves the tensor as in aligned.
rounding  'nearest' (default), 'feedback' or 'stochastic': how the edit is written into 16-bit weights.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Union

from mergekit.merge_methods import (
    BasePolicy,
    InputContract,
    MergeMethod,
    OptionalTensorPolicy,
    PerNonBase,
    TensorGroup,
    merge_method,
    register,
    registered_methods,
)
from pydantic import BeforeValidator
from torch import Tensor

from lox_merge.checkpoint.dtypes import code_of
from lox_merge.checkpoint.safetensors_format import TensorInfo
from lox_merge.errors import LoxMergeError, NonFiniteDeltaError, RecipeError
from lox_merge.jobs.layout import matrix_views
from lox_merge.jobs.lox_edit import edit_matrix
from lox_merge.jobs.recipe import DEFAULT_ALPHA, DEFAULT_RANK, Recipe
from lox_merge.jobs.select import TensorPlan
from lox_merge.maths.rank import parse_rank
from lox_merge.maths.rounding import ROUNDINGS
from lox_merge.maths.update import check_alpha
from lox_merge.mergekit.projection import PROJECT
from lox_merge.mergekit.realised import model_config, realised_updates, report_realised

__all__ = ["LOX", "METHOD", "OWN_METHODS", "lox_kernel", "realised_updates", "register_methods"]

METHOD = "lox"
REFERENCE = "https://arxiv.org/abs/2506.15606"


# These raise RecipeError, which is no ValueError: pydantic hands it on as it is instead of folding it into its own report.


def check_rank(value: Any) -> int | str:
    """A rank as mergekit carries it: a whole number ≥ 0 (rounded: gradients interpolate), or a rule's text. Raises RecipeError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise RecipeError(f"rank {value!r} is not a number or a rule such as 'full', '10%', 'energy:0.9' or 'noise-floor'.")
    if isinstance(value, str):
        if value.strip() == "0":
            return 0
        rule = parse_rank(value)
        return int(rule.value) if rule.kind == "fixed" else str(rule)
    if not math.isfinite(value) or value < 0:
        raise RecipeError(f"rank is {value}; use a whole number ≥ 0 (0 leaves a tensor as in aligned).")
    return round(value)


def check_alpha_value(value: Any) -> float:
    """alpha as a float. Raises RecipeError for what is no finite number ≥ 0: a negative factor removes safety."""
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError):
        raise RecipeError(f"alpha {value!r} is not a number; use one ≥ 0, such as 1.25 (the paper's).") from None
    return check_alpha(number)


def check_rounding(value: Any) -> str:
    if value not in ROUNDINGS:
        raise RecipeError(f"rounding {value!r} is not known; use one of {', '.join(ROUNDINGS)}.")
    return str(value)


# Not `int | str`: mergekit reads these annotations at run time, on Python 3.10 as well, inside Annotated.
Rank = Annotated[Union[int, str], BeforeValidator(check_rank)]  # noqa: UP007
Alpha = Annotated[float, BeforeValidator(check_alpha_value)]
RoundingName = Annotated[str, BeforeValidator(check_rounding)]


def lox_kernel(
    group: TensorGroup,
    rank: PerNonBase[Rank] = DEFAULT_RANK,
    alpha: PerNonBase[Alpha] = DEFAULT_ALPHA,
    rounding: PerNonBase[RoundingName] = "nearest",
) -> Tensor:
    """One output tensor. Inputs and output have one shape and one dtype (mergekit promotes the inputs to it).

    1-D tensors, rank 0 and alpha 0: as aligned. 2-D: one edit, bit for bit that of `lox-merge harden`. Stacked experts: one
    edit per expert, gate and up apart; convolutions: flattened (lox_merge.jobs.layout). Raises NonFiniteDeltaError.
    """
    (entry,) = group.non_base
    base: Tensor = group.base.tensor.contiguous()
    aligned: Tensor = entry.tensor.contiguous()
    name, shape = group.metadata.name or "tensor", tuple(aligned.shape)
    views = matrix_views(name, shape, model_config(entry.id) if aligned.ndim > 2 else {})
    if not views or rank[entry.id] == 0 or alpha[entry.id] == 0:
        return aligned
    info = TensorInfo(name, code_of(aligned.dtype), shape, 0, 0)
    job = TensorPlan(name, info, "edit", rank=parse_rank(rank[entry.id]), alpha=alpha[entry.id])
    recipe = Recipe(rounding=rounding[entry.id])
    out = aligned.clone()
    results = [edit_matrix(view.select(base), view.select(aligned), view.select(out), view, job, recipe, aligned.device) for view in views]
    if any(result.bad for result in results):
        raise NonFiniteDeltaError({name: sum(result.bad for result in results)})
    report_realised([(name, result.realised) for result in results if result.realised is not None])
    return out


LOX: MergeMethod = merge_method(
    lox_kernel,
    name=METHOD,
    pretty_name="LoX (low-rank extrapolation)",
    reference_url=REFERENCE,
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1, max_non_base=1),
    # An optional tensor that only aligned has is copied; one that only base has is found by preflight.
    optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_SINGLETON,
)


OWN_METHODS: dict[str, MergeMethod] = {method.spec.name: method for method in (LOX, PROJECT)}


def register_methods() -> None:
    """Makes `lox` and `lox_project` known to mergekit. Any number of calls and imports register them once.

    Raises LoxMergeError when something else has taken a name.
    """
    known = {method.spec.name: method.spec for method in registered_methods()}
    for name, method in OWN_METHODS.items():
        if name not in known:
            register(method)
        elif known[name].reference_url != method.spec.reference_url or {p.name for p in known[name].parameters} < {"rank"}:
            raise LoxMergeError(f"mergekit already has another merge method named {name!r}; use lox-merge harden or project instead.")


register_methods()
