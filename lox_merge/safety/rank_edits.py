"""What a model in memory can be at rank k: the base model with the first k terms of the delta, or aligned without k directions."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from lox_merge.maths.subspace import Subspace
from lox_merge.maths.terms import Terms, leading_terms, random_subspace_terms, random_terms

RandomKind = Literal["random", "random-subspace"]
RANDOM_KINDS: tuple[RandomKind, ...] = get_args(RandomKind)


@dataclass(frozen=True)
class DecomposedMatrix:
    """One matrix as an edit sees it. name: with the label of a part; delta: makes W_align - W_base in float32.

    shape: as stored, (d_out, d_in), or (d_in, d_out) where `transposed`.
    """

    name: str
    shape: tuple[int, int]
    transposed: bool
    subspace: Subspace
    delta: Callable[[], Tensor]


@dataclass(frozen=True)
class RankEdit:
    """Weights at rank k: those of the `anchor` plus the first k of `terms`, in every decomposed matrix. at_zero: what rank 0 is, in words."""

    anchor: Literal["base", "aligned"]
    terms: Callable[[DecomposedMatrix], Terms]
    at_zero: str


# theta_r = W_base + Proj_r(Delta), LoX (arXiv 2506.15606), sec. 3.
THETA = RankEdit("base", lambda matrix: leading_terms(matrix.subspace), "the base model's matrices")
# W_align - Proj_k(Delta): the leading directions of alignment taken away.
REMOVAL = RankEdit("aligned", lambda matrix: leading_terms(matrix.subspace).negative(), "the aligned model")


def random_removal(kind: RandomKind, seed: int, draw: int) -> RankEdit:
    """W_align minus random terms that have the norm of Proj_k(Delta) in every matrix. kind: see `random_terms`, `random_subspace_terms`."""

    def terms(matrix: DecomposedMatrix) -> Terms:
        # A seed of its own for each matrix: with a shared one, all matrices of a shape would get the same directions.
        own = zlib.crc32(f"{seed} {draw} {matrix.name}".encode())
        values = matrix.subspace.singular_values
        if kind == "random":
            return random_terms(matrix.shape, values, seed=own).negative()
        if matrix.transposed:
            return random_subspace_terms(matrix.delta().T, values, seed=own).transposed().negative()
        return random_subspace_terms(matrix.delta(), values, seed=own).negative()

    return RankEdit("aligned", terms, "the aligned model")
