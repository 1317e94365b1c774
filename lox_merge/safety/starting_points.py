"""What an attack starts from: the aligned model in memory, hardened, or edited as much in other directions (controls)."""

from __future__ import annotations

import zlib
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.errors import RequestError
from lox_merge.jobs.layout import MatrixView
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.select import TensorPlan
from lox_merge.maths.edits import Update, apply_update, full_rank_update_of_norm, gaussian_update, lox_update, random_subspace_update
from lox_merge.maths.precision import frobenius_norm
from lox_merge.maths.rank import RankRule
from lox_merge.safety.placement import place

Control = Literal["full-rank", "random-subspace", "gaussian"]
CONTROLS: tuple[Control, ...] = get_args(Control)
ALIGNED, HARDENED = "aligned", "LoX"


@torch.no_grad()
def set_starting_point(model: Any, plan: Plan, kind: str, *, hardened: Checkpoint | None = None, seed: int = 0) -> None:
    """Changes `model`, loaded from plan.aligned in float32, in place into the starting point `kind`.

    'aligned' leaves it. 'LoX' adds alpha * Proj_k(Delta) to every matrix of the plan. The controls (METHODS: the whole delta, a
    Haar-random subspace of it, Gaussian noise) have in each matrix the Frobenius norm of that edit, or of the edit in `hardened`
    where one is given. seed: of the random controls. Raises RequestError for another kind, or a `hardened` of other tensors.
    """
    if kind == ALIGNED:
        return
    if kind != HARDENED and kind not in CONTROLS:
        raise RequestError(f"the starting point {kind!r} is not known; use {', '.join((ALIGNED, HARDENED, *CONTROLS))}.")
    edited = {tensor.name: tensor for tensor in plan.edited}
    state = model.state_dict()

    def tensor_of(name: str) -> Tensor:
        stored = plan.aligned.tensor(name)
        return _edited(plan, edited[name], kind, hardened, seed, model.device) if name in edited else stored

    for group in place(model, plan.aligned.names)[0]:
        if any(name in edited for name, _ in group.sources):
            for name, value in group.parameters(tensor_of, model).items():
                state[name].copy_(value)


def _edited(plan: Plan, tensor: TensorPlan, kind: str, hardened: Checkpoint | None, seed: int, device: torch.device) -> Tensor:
    stored = plan.aligned.tensor(tensor.name).contiguous()
    aligned = stored.to(device=device, dtype=torch.float32, copy=True)
    earlier = plan.base.tensor(tensor.base_name).contiguous()
    base = earlier.to(device=device, dtype=torch.float32)
    given = None
    if hardened is not None:
        given = _of_hardened(hardened, tensor, aligned.shape).to(device=device, dtype=torch.float32).contiguous()
        if kind == HARDENED:
            return given
    for view in tensor.views:
        before = view.select(aligned)
        delta = before - view.select(base)
        if not bool(torch.isfinite(delta).all()) or not bool(delta.any()):
            continue  # as in hardening: nothing to extrapolate
        norm = None if given is None else frobenius_norm(view.select(given) - before)
        pair = view.select(earlier), view.select(stored)
        update = _update(kind, delta, pair, tensor, view, plan, norm, seed)
        before.copy_(apply_update(before, update, delta=delta)[0])
    return aligned


def _update(
    kind: str,
    delta: Tensor,
    pair: tuple[Tensor, Tensor],
    tensor: TensorPlan,
    view: MatrixView,
    plan: Plan,
    norm: float | None,
    seed: int,
) -> Update:
    """delta: float32; pair: base's and aligned's matrix as they are read."""
    rule = cast(RankRule, tensor.rank)
    rank = min(delta.shape)
    if rule.kind == "full":
        lox = Update(None, None, tensor.alpha)
    else:
        subspace = plan.triplets.subspace(tensor, view, delta, *pair)
        lox, rank = lox_update(subspace, tensor.alpha), subspace.rank
    if kind == HARDENED:
        return lox
    norm = lox.norm(delta) if norm is None else norm
    if kind == "full-rank":
        return full_rank_update_of_norm(delta, norm)
    # A seed of its own for each matrix: with a shared one, all matrices of a shape would get the same noise.
    own = zlib.crc32(f"{seed} {tensor.name}{view.label}".encode())
    if kind == "gaussian":
        return gaussian_update((delta.shape[0], delta.shape[1]), rank, norm, seed=own, device=delta.device)
    return random_subspace_update(delta, rank, norm, seed=own)


def check_hardened(hardened: Checkpoint, plan: Plan) -> None:
    """Raises RequestError unless `hardened` has every edited tensor of aligned, in its shape."""
    for tensor in plan.edited:
        if tensor.name not in hardened or tuple(hardened.info(tensor.name).shape) != tuple(tensor.info.shape):
            raise RequestError(
                f"hardened ({hardened.title}) has no {tensor.name} of shape {list(tensor.info.shape)}, so it was not made from aligned "
                f"({plan.aligned.title}). Give the output of lox-merge harden for this pair, or leave it out to harden in memory."
            )


def check_some_edit(hardened: Checkpoint, plan: Plan) -> None:
    """Raises RequestError where `hardened` holds aligned's weights or base's. Stops at the first tensor that tells them apart."""
    for role, other in (("aligned", plan.aligned), ("base", plan.base)):
        pairs = ((hardened.tensor(tensor.name), other.tensor(tensor.name if role == "aligned" else tensor.base_name)) for tensor in plan.edited)
        # An adapter's tensors are float32 over whatever its base stores.
        if all(torch.equal(one.float(), two.float()) for one, two in pairs):
            raise RequestError(
                f"hardened ({hardened.title}) holds the same weights as {role} ({other.title}): nothing would be compared. "
                "Give the output of lox-merge harden, or leave it out to harden in memory."
            )


def _of_hardened(hardened: Checkpoint, tensor: TensorPlan, shape: torch.Size) -> Tensor:
    return hardened.tensor(tensor.name).reshape(shape)
