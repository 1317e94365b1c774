"""What a user asks for: the settings of a hardening, checked on construction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lox_merge.errors import RecipeError
from lox_merge.jobs.settings import Settings
from lox_merge.maths.rank import RankRule, rank_rule
from lox_merge.maths.update import check_alpha
from lox_merge.typed_fields import FieldError

DEFAULT_RANK = 6
DEFAULT_ALPHA = 1.25


@dataclass(frozen=True)
class Recipe(Settings):
    """Settings of a LoX hardening; W_align + alpha · Proj_rank(W_align − W_base) on every selected tensor.

    rank: RankRule, number, or text ('6', 'full', '10%', 'energy:0.9', 'noise-floor'). alpha: extrapolation factor ≥ 0.
    rank_pattern, alpha_pattern: (regular expression, value) pairs, first match wins. requantise: write a quantised ALIGNED in its own
    form, with the scales that it has. The rest is in `Settings`.
    Raises RecipeError for anything else.
    """

    rank: RankRule | int | str = DEFAULT_RANK
    alpha: float = DEFAULT_ALPHA
    rank_pattern: tuple[tuple[str, RankRule | int | str], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    requantise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        set_value = object.__setattr__  # frozen: normalised once, here
        set_value(self, "rank", rank_rule(self.rank))
        set_value(self, "alpha", check_alpha(self.alpha))
        set_value(self, "rank_pattern", tuple((pattern, rank_rule(rank)) for pattern, rank in self.rank_pattern))
        set_value(self, "alpha_pattern", tuple((pattern, check_alpha(alpha, f"alpha for {pattern!r}")) for pattern, alpha in self.alpha_pattern))
        if self.alpha == 0 and not any(alpha for _, alpha in self.alpha_pattern):
            raise RecipeError("alpha is 0: the output would be the aligned model unchanged; use a number > 0, such as 1.25 (the paper's).")
        if self.requantise and self.dtype is not None:
            raise RecipeError(f"requantise keeps the quantised form, and dtype {self.dtype} is another one. Leave one of them out.")
        if self.rounding == "feedback" and any(rank_rule(rank).kind == "full" for rank in (self.rank, *(rank for _, rank in self.rank_pattern))):
            raise RecipeError("rounding 'feedback' needs a limited rank: with rank 'full' use --rounding stochastic or --dtype float32.")

    def patterns(self) -> dict[str, tuple[str, ...]]:
        """Every regular expression of the recipe by the option that gave it."""
        return super().patterns() | {
            "--rank-pattern": tuple(pattern for pattern, _ in self.rank_pattern),
            "--alpha-pattern": tuple(pattern for pattern, _ in self.alpha_pattern),
        }

    def rank_for(self, name: str) -> RankRule:
        for pattern, rank in self.rank_pattern:
            if self.matches(pattern, name):
                return rank_rule(rank)
        return rank_rule(self.rank)

    def alpha_for(self, name: str) -> float:
        for pattern, alpha in self.alpha_pattern:
            if self.matches(pattern, name):
                return alpha
        return self.alpha

    def with_rank(self, rank: RankRule | int | str) -> Recipe:
        return replace(self, rank=rank)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Recipe:
        """The recipe that `to_json` wrote. Raises RecipeError for settings that this version does not know."""
        cls.check_known(values)
        try:
            pairs: dict[str, Any] = {name: _pairs(values[name]) for name in ("rank_pattern", "alpha_pattern") if name in values}
            return cls(**{**values, **pairs})
        except (FieldError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise cls.not_understood(error) from error

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": str(self.rank),
            "alpha": self.alpha,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "rank_pattern": [[pattern, str(rank)] for pattern, rank in self.rank_pattern],
            "alpha_pattern": [[pattern, alpha] for pattern, alpha in self.alpha_pattern],
            "linear_only": self.linear_only,
            "dtype": self.dtype,
            "rounding": self.rounding,
            "tolerance": self.tolerance,
            "seed": self.seed,
            "fused": self.fused,
            "skip_non_finite": self.skip_non_finite,
            **({"requantise": True} if self.requantise else {}),
        }


def _pairs(values: list[list[Any]]) -> tuple[tuple[str, Any], ...]:
    return tuple((str(pattern), value) for pattern, value in values)
