"""What an inspection is asked for, checked on construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

from lox_merge.errors import RecipeError
from lox_merge.jobs.recipe import DEFAULT_RANK, Recipe
from lox_merge.jobs.settings import DEFAULT_TOLERANCE
from lox_merge.maths.rank import RankRule, rank_rule
from lox_merge.maths.spectral import DENSE_SHARE, EXACT_SIDE
from lox_merge.maths.subspace import Side
from lox_merge.safety.seeds import check_seed
from lox_merge.typed_fields import check_fields

DEFAULT_FRACTIONS = (0.01,)
DEFAULT_ETAS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
DEFAULT_DRAWS = 20


@dataclass(frozen=True)
class InspectSettings:
    """rank: of R_align and R_ft, a number or a percentage of the short side, clipped to it as in hardening.

    fractions: of the short side, for the energy-kept ratio. etas: energies for the subspace overlap. side: which singular vectors span
    the subspaces, 'left' (the output side: LoX, and the authors' code of the overlap) or 'right'. full_spectrum: every singular value
    of every delta (a float64 Gram eigendecomposition); otherwise the leading ones that rank and fractions need, and all where they
    need more than a fifth or the short side is at most 128. draws: random subspaces per matrix. The rest as in Recipe.
    Raises RecipeError.
    """

    rank: RankRule | int | str = DEFAULT_RANK
    fractions: tuple[float, ...] = DEFAULT_FRACTIONS
    etas: tuple[float, ...] = DEFAULT_ETAS
    side: Side = "left"
    full_spectrum: bool = False
    draws: int = DEFAULT_DRAWS
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    linear_only: bool = False
    fused: str = "split"
    tolerance: float = DEFAULT_TOLERANCE
    seed: int = 0
    skip_non_finite: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        set_value = object.__setattr__  # frozen: normalised once, here
        set_value(self, "rank", rank_rule(self.rank))
        set_value(self, "fractions", _shares(self.fractions, "fraction", "0.01"))
        set_value(self, "etas", _shares(self.etas, "eta", "0.5"))
        if self.rule.kind not in ("fixed", "percent"):
            raise RecipeError(f"rank {self.rank} depends on the spectrum; give a number or a percentage, such as {DEFAULT_RANK} or 10%.")
        if self.side not in get_args(Side):
            raise RecipeError(f"side {self.side!r} is not known; use 'left' (the output side) or 'right'.")
        if self.draws < 2:
            raise RecipeError(f"draws is {self.draws}; a band needs at least 2 random subspaces.")
        check_seed(self.seed)
        _ = self.recipe  # checks the rest

    @property
    def rule(self) -> RankRule:
        assert isinstance(self.rank, RankRule)
        return self.rank

    @property
    def recipe(self) -> Recipe:
        """The same selection of tensors as a hardening with these settings makes."""
        return Recipe(
            rank=self.rule,
            include=self.include,
            exclude=self.exclude,
            linear_only=self.linear_only,
            fused=self.fused,
            tolerance=self.tolerance,
            seed=self.seed,
            skip_non_finite=self.skip_non_finite,
        )

    def rank_of(self, short_side: int) -> int:
        """k of R_align for this short side."""
        k = self.rule.from_shape(short_side)
        assert k is not None
        return k

    def fraction_rank(self, fraction: float, short_side: int) -> int:
        """k = max(1, round(f·min(d_out, d_in))) ("Safety subspaces are not distinct", sec. 2)."""
        return max(1, round(fraction * short_side))

    def triplets_of(self, short_side: int) -> int:
        """How many singular triplets of a delta are computed; `short_side` is all of them."""
        needed = max([self.rank_of(short_side), *(self.fraction_rank(fraction, short_side) for fraction in self.fractions)])
        dense = self.full_spectrum or short_side <= EXACT_SIDE or needed > DENSE_SHARE * short_side
        return short_side if dense else needed

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "rank": str(self.rank),
            "fractions": list(self.fractions),
            "etas": list(self.etas),
            "side": self.side,
            "full_spectrum": self.full_spectrum,
            "draws": self.draws,
            "seed": self.seed,
            "tolerance": self.tolerance,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "linear_only": self.linear_only,
            "fused": self.fused,
            "skip_non_finite": self.skip_non_finite,
        }


def _shares(values: tuple[float, ...], what: str, example: str) -> tuple[float, ...]:
    """Sorted, each once, each inside (0, 1)."""
    for value in values:
        if not (math.isfinite(value) and 0 < value < 1):
            raise RecipeError(f"{what} {value:g} is outside (0, 1); use a share such as {example}.")
    return tuple(sorted(set(values)))
