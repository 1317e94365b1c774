"""Looks at the weights before a filter writes anything: would it weaken the model, and which layers are least similar?"""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from lox_merge.checkpoint.adapter import AdaptedCheckpoint
from lox_merge.errors import NonFiniteDeltaError, NumericalError, RequestError
from lox_merge.jobs.engine import count_non_finite, typical_cost
from lox_merge.jobs.filter_edit import FilterEdit
from lox_merge.jobs.layout import MatrixView
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.select import TensorPlan
from lox_merge.jobs.work import Crew, CrewSize, available_cores, form_delta
from lox_merge.maths.geometry import REVERTING_COSINE

# float32 pieces that stay in a core's cache.
_PIECE = 2**18


@dataclass(frozen=True)
class Directedness:
    """Of Δ_ft against −Δ_align, over the tensors that fine-tuning changed. cosine: None where one of them is zero."""

    reversal: float | None
    finetuned_norm: float


def measure_direction(plan: Plan) -> Directedness:
    """One pass over the tensors to be edited. Tensors that fine-tuning left alone say nothing about where it went (an adapter on
    some modules that undoes alignment there would hide behind all others), so their Δ_align does not count."""
    # An adapter's tensors are made when they are asked for: one at a time.
    made = any(isinstance(checkpoint, AdaptedCheckpoint) for checkpoint in plan.checkpoints.values())
    crew = Crew(torch.device("cpu"), CrewSize(1 if made else available_cores(), 1))
    try:
        with crew.threads():
            begun = [crew.submit(_sums, plan, tensor) for tensor in plan.edited]
            sums = [entry for future in begun if (entry := future.result())[2] > 0]
    finally:
        crew.close()
    product, align, finetuned = (math.fsum(entry[position] for entry in sums) for position in range(3))
    if not all(math.isfinite(value) for value in (product, align, finetuned)):
        return Directedness(None, math.inf)  # the run itself counts NaN and Inf, or leaves such tensors alone
    return Directedness(-product / math.sqrt(align * finetuned) if align and finetuned else None, math.sqrt(finetuned))


def _sums(plan: Plan, tensor: TensorPlan) -> tuple[float, float, float]:
    """⟨Δ_align, Δ_ft⟩, ‖Δ_align‖², ‖Δ_ft‖² of one tensor; zeros where it holds NaN or Inf and such tensors are left alone."""
    base, aligned, finetuned = (plan.checkpoints[role].tensor(tensor.name_in(role)).reshape(-1) for role in ("base", "aligned", "finetuned"))
    for dtype in (torch.float32, torch.float64):
        sums = torch.zeros(3, dtype=torch.float64)
        for start in range(0, aligned.numel(), _PIECE):
            piece = slice(start, start + _PIECE)
            middle = aligned[piece].float()
            delta, change = middle - base[piece], finetuned[piece] - middle
            delta, change = delta.float().to(dtype), change.float().to(dtype)
            sums += torch.stack([delta.dot(change), delta.dot(delta), change.dot(change)]).double()
        if bool(torch.isfinite(sums).all()):
            break  # products of large finite entries are no number in float32 only
    if not bool(torch.isfinite(sums).all()) and plan.recipe.skip_non_finite:
        return 0.0, 0.0, 0.0
    return float(sums[0]), float(sums[1]), float(sums[2])


def check_direction(plan: Plan) -> None:
    """Raises RequestError where Δ_ft is zero, or points back along −Δ_align so that filtering would write a model without its alignment."""
    found = measure_direction(plan)
    names = {role: checkpoint.title for role, checkpoint in plan.checkpoints.items()}
    if found.finetuned_norm == 0:
        raise RequestError(
            f"all {len(plan.edited)} fine-tuning deltas are zero: finetuned ({names['finetuned']}) and aligned ({names['aligned']}) hold the same "
            "weights, and the output would be the aligned model. Give the model that was fine-tuned from aligned."
        )
    if found.reversal is not None and found.reversal >= REVERTING_COSINE:
        raise RequestError(
            f"finetuned ({names['finetuned']}) points back along the alignment delta: the cosine of finetuned − aligned with base − aligned is "
            f"{found.reversal:.3f}, and the limit is {REVERTING_COSINE:g}. Filtering would write a model with its alignment removed, which is "
            f"not supported. The likely mistake: the base model ({names['base']}) or a copy of it was given as finetuned."
        )


def find_least_similar(plan: Plan, edit: FilterEdit, device: torch.device) -> frozenset[str]:
    """Names (tensor and part) of the `recipe.layers` matrices with the smallest cos(P(Δ_ft), Δ_ft). Takes a decomposition of every
    matrix, as the run itself does. Ties go to the tensor that comes first."""
    assert edit.recipe.layers is not None
    crew = Crew(device, CrewSize.of(device, typical_cost(plan)))

    def cosine(tensor: TensorPlan, view: MatrixView, stored: list[Tensor]) -> float | None:
        base, aligned, finetuned = (matrix.to(crew.device) for matrix in stored)
        try:
            delta, _, bad = form_delta(base, aligned)
            change, change_norm, bad_change = form_delta(aligned, finetuned, slot=1)
        except NumericalError as error:
            raise NumericalError(f"tensor {tensor.name}{view.label}: {error}.") from error
        if bad or bad_change:
            if not plan.recipe.skip_non_finite:
                raise NonFiniteDeltaError(count_non_finite(plan))
            return None
        if change_norm == 0:
            return None
        _, projection = edit.project(delta, change, base, aligned, view, tensor, plan.triplets)
        return 0.0 if projection.cosine is None else projection.cosine

    try:
        with crew.threads():
            waiting: deque[Future[float | None]] = deque()
            names: list[str] = []
            cosines: list[float | None] = []
            for tensor in plan.edited:
                for view in tensor.views:
                    stored = [view.select(checkpoint.tensor(tensor.name_in(role))) for role, checkpoint in plan.checkpoints.items()]
                    waiting.append(crew.submit(cosine, tensor, view, stored))
                    names.append(tensor.name + view.label)
                    if len(waiting) > 2 * crew.workers:
                        cosines.append(waiting.popleft().result())
            cosines += [future.result() for future in waiting]
    finally:
        crew.close()
    known = sorted((value, order) for order, value in enumerate(cosines) if value is not None)
    return frozenset(names[order] for _, order in known[: edit.recipe.layers])
