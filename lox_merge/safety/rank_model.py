"""One model in memory whose weights become theta_r, for any r, and the aligned ones again at the end.

theta_r = W_base + Proj_r(W_align - W_base) for matrices, W_align for everything else (LoX, arXiv 2506.15606, sec. 3). For
small r it is a model whose alignment is taken away: it exists in memory alone, and nothing here writes to a disk.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lox_merge.errors import LoxMergeWarning, RequestError
from lox_merge.jobs.factors import Factors
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.select import TensorPlan
from lox_merge.maths.edits import PIECE, Update, lox_update
from lox_merge.maths.precision import full_precision_matmul
from lox_merge.safety.placement import Group, check_loaded, place

# On a GPU the base matrices stay there if they take at most this share of its free memory; replies need the rest.
_SHARE_OF_FREE_MEMORY = 0.5


class RankSwapper:
    """Sets the weights of `model`, loaded from the aligned checkpoint, to theta_r and back.

    plan: which tensors are decomposed, and the open checkpoints (they stay open as long as this is used). Matrices that the
    plan leaves out stay as in aligned. factors: of this pair; rank: the highest r that will be asked (default: all that
    they hold). Used as a context it restores the aligned weights on leaving. Raises RequestError when the model's weights
    are not those of the aligned checkpoint, or when they are not in memory.

    theta_r is always made anew from the base weights and the first r triplets in float32 and rounded once to the model's
    dtype, so it does not depend on which ranks were set before.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, factors: Factors, *, rank: int | None = None) -> None:
        self.model, self.limit = model, factors.rank if rank is None else rank
        factors.require(self.limit)
        self._factors, self._base, self._aligned = factors, plan.base, plan.aligned
        self._edited = {tensor.name: tensor for tensor in plan.edited if any((tensor.name, view.label) in factors for view in tensor.views)}
        if not self._edited:
            raise RequestError(f"{factors.path.name} holds no factors of the matrices selected here. Decompose again with the same selection.")
        groups, unused = place(model, self._aligned.names)
        lost = [name for name in unused if name in self._edited]
        if lost:
            warnings.warn(
                f"{len(lost)} decomposed tensor(s), such as {lost[0]}, have no place in {type(model).__name__} and play no part in its replies",
                LoxMergeWarning,
                stacklevel=2,
            )
        self._groups = [group for group in groups if any(name in self._edited for name, _ in group.sources)]
        if not self._groups:
            raise RequestError(f"none of the decomposed tensors is part of the loaded {type(model).__name__}. Load the aligned checkpoint itself.")
        for group in self._groups:
            check_loaded(model, group, self._aligned.tensor)
        self._state = model.state_dict()
        self._updates = self._prepare()
        self._resident: dict[str, Tensor] = {}
        self._keep_base_near()
        self.rank: int | None = None

    def __enter__(self) -> RankSwapper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()

    def set_rank(self, rank: int) -> None:
        """Weights become theta_rank; 0 gives the base model's matrices. Raises RequestError above the limit."""
        if rank < 0:
            raise RequestError(f"rank {rank} is negative; ranks start at 0 (the base model's matrices).")
        if rank > self.limit:
            self._factors.require(rank)
            raise RequestError(f"rank {rank} is above {self.limit}, the highest one that this search was prepared for.")
        self.rank = rank
        with torch.no_grad():
            for group in self._groups:
                if group.plain:
                    self._write_theta(self._edited[group.sources[0][0]], self._state[group.target], rank)
                else:
                    self._put(group, lambda name: self._theta(name, rank))

    def restore(self) -> None:
        """Puts the aligned weights back, bit for bit, from the aligned checkpoint's files."""
        with torch.no_grad():
            for group in self._groups:
                self._put(group, self._aligned.tensor)
        self.rank = None

    def _put(self, group: Group, tensor_of: Callable[[str], Tensor]) -> None:
        for name, value in group.parameters(tensor_of, self.model).items():
            self._state[name].copy_(value)

    def _theta(self, name: str, rank: int) -> Tensor:
        """theta_rank of one checkpoint tensor, float32 (a fused parameter is rounded after it is put together)."""
        tensor, stored = self._edited.get(name), self._aligned.tensor(name)
        wide = torch.promote_types(torch.float32, stored.dtype)
        if tensor is None:
            return stored.to(wide)
        out = torch.empty(tensor.info.shape, dtype=wide)
        self._write_theta(tensor, out, rank)
        return out

    def _write_theta(self, tensor: TensorPlan, out: Tensor, rank: int) -> None:
        """Writes every matrix of one tensor into `out` (its shape, any dtype and device)."""
        whole = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
        base = self._resident.get(tensor.name)
        base = self._base.tensor(tensor.base_name) if base is None else base
        if any((tensor.name, view.label) not in self._updates for view in tensor.views):
            whole.copy_(self._aligned.tensor(tensor.name))  # a matrix without factors (NaN in its delta) stays as in aligned
        for view in tensor.views:
            update = self._updates.get((tensor.name, view.label))
            if update is not None:
                _add(view.select(base), update, rank, view.select(whole))
        if whole is not out:
            out.copy_(whole)

    def _prepare(self) -> dict[tuple[str, str], Update]:
        """U_k S_k and V_k of every matrix, packed in memory beside its parameter: a few megabytes per rank of a 7B model."""
        updates = {}
        for group in self._groups:
            device = self._state[group.target].device if group.plain else torch.device("cpu")
            for name, _ in group.sources:
                for view in self._edited[name].views if name in self._edited else ():
                    if (name, view.label) in self._factors:
                        update = lox_update(self._factors.subspace(name, view.label, self.limit), 1.0)
                        assert update.left is not None and update.right is not None
                        updates[name, view.label] = Update(update.left.to(device).contiguous(), update.right.to(device).contiguous())
        return updates

    def _keep_base_near(self) -> None:
        """Base matrices of parameters on a GPU stay on it where memory allows: over the bus they would take longer than replies."""
        plain = [group for group in self._groups if group.plain and self._state[group.target].device.type == "cuda"]
        for device in {self._state[group.target].device for group in plain}:
            here = {group.sources[0][0] for group in plain if self._state[group.target].device == device}
            needed = sum(self._base.info(self._edited[name].base_name).bytes for name in here)
            if needed <= _SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info(device)[0]:
                self._resident |= {name: self._base.tensor(self._edited[name].base_name).to(device) for name in here}


def _add(base: Tensor, update: Update, rank: int, out: Tensor) -> None:
    """out = base + the first `rank` terms of the update; float32 sums, one rounding to the dtype of `out`."""
    assert update.left is not None and update.right is not None
    wide = torch.promote_types(base.dtype, torch.float32)
    rows, columns = base.shape
    if rank == 0:
        out.copy_(base)
        return
    first = Update(update.left[:, :rank], update.right[:, :rank])
    # On a CPU a piece stays in a core's cache; on a GPU one product beats many launches.
    step = max(1, PIECE // max(1, columns)) if out.device.type == "cpu" else rows
    with full_precision_matmul(out.device):
        for start in range(0, rows, step):
            piece = slice(start, start + step)
            out[piece] = first.added_to(base[piece].to(device=out.device, dtype=wide), piece, None)
