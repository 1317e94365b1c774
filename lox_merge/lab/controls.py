"""Equal-norm controls in memory: edits as large as LoX, matrix by matrix, that do not follow its directions.

Without them a demonstration shows only that some large edit helped ("Safety subspaces are not distinct", Ponkshe et al. 2025).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from lox_merge.maths.edits import (
    Update,
    apply_update,
    full_rank_update_of_norm,
    gaussian_update,
    lox_edit,
    random_subspace_update,
)

Control = Literal["full-rank", "gaussian", "random-subspace"]


def edited_state(
    base: Mapping[str, Tensor],
    aligned: Mapping[str, Tensor],
    kind: Literal["lox"] | Control,
    *,
    rank: int = 6,
    alpha: float = 1.25,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Aligned's weights with every tensor of two dimensions edited (embeddings and output head too), the others unchanged.

    lox: W_align + alpha * Proj_k(Delta). The controls have the Frobenius norm of that edit in each matrix: 'full-rank' is
    the whole delta rescaled (ExPO, arXiv 2404.16792), 'random-subspace' the delta in a random subspace of the same rank,
    'gaussian' noise of the same rank. base, aligned: the same names and shapes, float32. seed: of the random controls.
    """
    edited = {}
    for name, weight in aligned.items():
        if weight.ndim != 2:
            edited[name] = weight.clone()
            continue
        delta = weight.float() - base[name].float()
        lox, _, realised = lox_edit(base[name], weight, rank, alpha, delta=delta)
        if kind == "lox":
            edited[name] = lox
            continue
        # A seed of its own for each matrix: with a shared one, all matrices of a shape would get the same noise.
        update = _control(kind, delta, rank, realised.intended_norm, zlib.crc32(f"{seed} {name}".encode()))
        edited[name], _ = apply_update(weight, update, delta=delta)
    return edited


def _control(kind: Control, delta: Tensor, rank: int, norm: float, seed: int) -> Update:
    if kind == "full-rank":
        return full_rank_update_of_norm(delta, norm)
    if kind == "gaussian":
        return gaussian_update((delta.shape[0], delta.shape[1]), rank, norm, seed=seed)
    return random_subspace_update(delta, rank, norm, seed=seed)
