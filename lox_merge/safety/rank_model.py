"""One model in memory whose weights become those of an edit at any rank, and the aligned ones again at the end.

By default theta_r = W_base + Proj_r(W_align - W_base) for matrices, W_align for everything else (LoX, arXiv 2506.15606, sec. 3).
Models whose alignment is taken away exist in memory alone: nothing here writes to a disk.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from types import TracebackType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.errors import LoxMergeWarning, RequestError
from lox_merge.jobs.factors import Factors
from lox_merge.jobs.layout import MatrixView
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.select import TensorPlan
from lox_merge.maths.pieces import rows_at_once
from lox_merge.maths.precision import full_precision_matmul
from lox_merge.maths.terms import Terms
from lox_merge.maths.update import Update
from lox_merge.safety.placement import Group, check_loaded, place
from lox_merge.safety.rank_edits import THETA, DecomposedMatrix, RankEdit

# On a GPU the anchor's matrices stay there if they take at most this share of its free memory; replies need the rest.
_SHARE_OF_FREE_MEMORY = 0.5


class RankSwapper:
    """Sets the weights of `model`, loaded from the aligned checkpoint, to those of `edit` at rank r (default: theta_r) and back.

    plan: which tensors are decomposed, and the open checkpoints (they stay open as long as this is used). Matrices that the
    plan leaves out stay as in aligned. factors: of this pair; rank: the highest r that will be asked (default: all that
    they hold). Used as a context it restores the aligned weights on leaving. Raises RequestError when the model's weights
    are not those of the aligned checkpoint, or when they are not in memory.

    The weights are always made anew from the anchor's (for theta_r the base model's) and the first r terms in float32 and rounded
    once to the model's dtype, so they do not depend on which ranks were set before.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, factors: Factors, *, rank: int | None = None, edit: RankEdit = THETA) -> None:
        self.model, self.limit = model, factors.rank if rank is None else rank
        factors.require(self.limit)
        self._factors, self._base, self._aligned, self._edit = factors, plan.base, plan.aligned, edit
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
        self._terms = self._prepare()
        self._resident: dict[str, Tensor] = {}
        self._keep_anchor_near()
        self.rank: int | None = None

    def __enter__(self) -> RankSwapper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()

    def use(self, edit: RankEdit) -> None:
        """Another edit of the same anchor, from the next `set_rank` on. The terms of the last one are let go first."""
        if edit.anchor != self._edit.anchor:
            raise ValueError(f"an edit of {edit.anchor} cannot follow one of {self._edit.anchor}")
        self._edit, self._terms = edit, {}
        self._terms = self._prepare()

    def set_rank(self, rank: int) -> None:
        """Weights become those of the edit at `rank`; 0 gives the anchor's matrices. Raises RequestError above the limit."""
        if rank < 0:
            raise RequestError(f"rank {rank} is negative; ranks start at 0 ({self._edit.at_zero}).")
        if rank > self.limit:
            self._factors.require(rank)
            raise RequestError(f"rank {rank} is above {self.limit}, the highest one that this search was prepared for.")
        self.rank = rank
        with torch.no_grad():
            for group in self._groups:
                if group.plain:
                    self._write_edited(self._edited[group.sources[0][0]], self._state[group.target], rank)
                else:
                    self._put(group, lambda name: self._edited_tensor(name, rank))

    def realised_gain(self) -> float | None:
        """<R, T>/||T||² over all matrices: R, what the edit changed in memory; T, what it was to change. Sums in float64.

        1 but where rounding to the model's dtype loses some of a small change. None in float32 and wider, at rank 0 and without an edit.
        """
        if not self.rank or self.model.dtype.itemsize >= torch.float32.itemsize:
            return None
        product = intended = 0.0
        with torch.no_grad():
            for name, held in self._in_memory(self.rank):
                anchor = self._near(self._edited[name])
                for view in self._edited[name].views:
                    terms = self._terms.get((name, view.label))
                    if terms is not None:
                        first = terms.first(self.rank)
                        product += _agreement(view.select(anchor), view.select(held), first)
                        intended += first.norm(None) ** 2
        return product / intended if intended else None

    def restore(self) -> None:
        """Puts the aligned weights back, bit for bit, from the aligned checkpoint's files."""
        with torch.no_grad():
            for group in self._groups:
                self._put(group, self._aligned.tensor)
        self.rank = None

    def _put(self, group: Group, tensor_of: Callable[[str], Tensor]) -> None:
        for name, value in group.parameters(tensor_of, self.model).items():
            self._state[name].copy_(value)

    def _edited_tensor(self, name: str, rank: int) -> Tensor:
        """One checkpoint tensor at `rank`, float32 (a fused parameter is rounded after it is put together)."""
        tensor, stored = self._edited.get(name), self._aligned.tensor(name)
        wide = torch.promote_types(torch.float32, stored.dtype)
        if tensor is None:
            return stored.to(wide)
        out = torch.empty(tensor.info.shape, dtype=wide)
        self._write_edited(tensor, out, rank)
        return out

    def _write_edited(self, tensor: TensorPlan, out: Tensor, rank: int) -> None:
        """Writes every matrix of one tensor into `out` (its shape, any dtype and device)."""
        whole = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
        anchor = self._near(tensor)
        if any((tensor.name, view.label) not in self._terms for view in tensor.views):
            whole.copy_(self._aligned.tensor(tensor.name))  # a matrix without factors (NaN in its delta) stays as in aligned
        for view in tensor.views:
            terms = self._terms.get((tensor.name, view.label))
            if terms is not None:
                _add(view.select(anchor), terms, rank, view.select(whole))
        if whole is not out:
            out.copy_(whole)

    def _place_of_anchor(self, tensor: TensorPlan) -> tuple[Checkpoint, str]:
        return (self._base, tensor.base_name) if self._edit.anchor == "base" else (self._aligned, tensor.name)

    def _anchor(self, tensor: TensorPlan) -> Tensor:
        checkpoint, name = self._place_of_anchor(tensor)
        return checkpoint.tensor(name)

    def _near(self, tensor: TensorPlan) -> Tensor:
        """The anchor's tensor, where it is kept on a GPU from there."""
        resident = self._resident.get(tensor.name)
        return self._anchor(tensor) if resident is None else resident

    def _in_memory(self, rank: int) -> Iterator[tuple[str, Tensor]]:
        """Every decomposed tensor as the model holds it now. Rounding goes entry by entry, so parts of a fused parameter are made again."""
        for group in self._groups:
            for name, _ in group.sources:
                if name in self._edited:
                    held = self._state[group.target]
                    yield name, held.contiguous() if group.plain else self._edited_tensor(name, rank).to(held.dtype)

    def _prepare(self) -> dict[tuple[str, str], Terms]:
        """The terms of every matrix, packed in memory beside its parameter: a few megabytes per rank of a 7B model."""
        terms = {}
        for group in self._groups:
            device = self._state[group.target].device if group.plain else torch.device("cpu")
            for name, _ in group.sources:
                for view in self._edited[name].views if name in self._edited else ():
                    if (name, view.label) in self._factors:
                        matrix = self._matrix(self._edited[name], view, device)
                        terms[name, view.label] = self._edit.terms(matrix).to(device)
        return terms

    def _matrix(self, tensor: TensorPlan, view: MatrixView, device: torch.device) -> DecomposedMatrix:
        def delta() -> Tensor:
            after, before = (whole.contiguous() for whole in (self._aligned.tensor(tensor.name), self._base.tensor(tensor.base_name)))
            return view.select(after).to(device, torch.float32) - view.select(before).to(device, torch.float32)

        subspace = self._factors.subspace(tensor.name, view.label, self.limit)
        return DecomposedMatrix(tensor.name + view.label, view.shape, view.transposed, subspace, delta)

    def _keep_anchor_near(self) -> None:
        """The anchor's matrices of parameters on a GPU stay on it where memory allows: over the bus they would take longer than replies."""
        plain = [group for group in self._groups if group.plain and self._state[group.target].device.type == "cuda"]
        for device in {self._state[group.target].device for group in plain}:
            here = {group.sources[0][0] for group in plain if self._state[group.target].device == device}
            places = [self._place_of_anchor(self._edited[name]) for name in here]
            needed = sum(checkpoint.info(name).bytes for checkpoint, name in places)
            if needed <= _SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info(device)[0]:
                self._resident |= {name: self._anchor(self._edited[name]).to(device) for name in here}


def _add(anchor: Tensor, terms: Terms, rank: int, out: Tensor) -> None:
    """out = anchor + the first `rank` terms; float32 sums, one rounding to the dtype of `out`."""
    wide = torch.promote_types(anchor.dtype, torch.float32)
    if rank == 0:
        out.copy_(anchor)
        return
    step = rows_at_once(out, rank)
    changes = terms.first(rank).in_pieces(step, wide)
    with full_precision_matmul(out.device):
        for target, stored, change in zip(torch.split(out, step), torch.split(anchor, step), changes, strict=True):
            target.copy_(change.added_to(stored.to(device=out.device, dtype=wide)))


def _agreement(anchor: Tensor, held: Tensor, update: Update) -> float:
    """<held - anchor, T>, the anchor first rounded to the dtype of `held`."""
    product = torch.zeros((), dtype=torch.float64, device=held.device)
    step = rows_at_once(held, update.rank)
    with full_precision_matmul(held.device):
        for stored, kept, change in zip(torch.split(anchor, step), torch.split(held, step), update.in_pieces(step, torch.float32), strict=True):
            before = stored.to(device=held.device, dtype=held.dtype).float()
            product += change.inner_product(kept.float() - before)
    return float(product)
