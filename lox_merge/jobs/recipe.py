"""What a user asks for: the settings of a hardening, checked on construction."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

from lox_merge.checkpoint.dtypes import OUTPUT_DTYPES
from lox_merge.errors import RecipeError
from lox_merge.maths.rank import RankRule, parse_rank
from lox_merge.maths.rounding import ROUNDINGS, Rounding

DEFAULT_RANK = 6
DEFAULT_ALPHA = 1.25
DEFAULT_TOLERANCE = 1e-3


def check_alpha(alpha: float, where: str = "alpha") -> float:
    """`alpha` if it hardens. Raises RecipeError for negative values (they remove safety), NaN and infinity."""
    if not math.isfinite(alpha):
        raise RecipeError(f"{where} is {alpha}; use a finite number ≥ 0, such as 1.25 (the paper's).")
    if alpha < 0:
        raise RecipeError(f"{where} is {alpha:g}: a negative factor walks back to the base model and removes safety; not supported.")
    return float(alpha)


def compile_pattern(pattern: str, option: str) -> re.Pattern[str]:
    """A user's regular expression. Raises RecipeError with the option and the reason."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"{option} {pattern!r} is not a regular expression: {error}.") from None


@dataclass(frozen=True)
class Recipe:
    """Settings of a LoX hardening; W_align + alpha · Proj_rank(W_align − W_base) on every selected tensor.

    rank: RankRule, number, or text ('6', 'full', '10%', 'energy:0.9', 'noise-floor'). alpha: extrapolation factor ≥ 0.
    include, exclude: regular expressions searched in tensor names; a tensor is edited if some `include` (or none is
    given) and no `exclude` matches. rank_pattern, alpha_pattern: (regular expression, value) pairs, first match wins.
    linear_only: leave embeddings, lm_head and convolutions as in aligned. dtype: output dtype, None keeps each tensor's.
    tolerance: relative Frobenius error wanted of Proj_k(Δ). fused: 'split' takes gate and up fused inside stacked
    experts as two matrices. skip_non_finite: copy tensors whose delta holds NaN or Inf instead of failing.
    Raises RecipeError for anything else.
    """

    rank: RankRule | int | str = DEFAULT_RANK
    alpha: float = DEFAULT_ALPHA
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rank_pattern: tuple[tuple[str, RankRule | int | str], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    linear_only: bool = False
    dtype: str | None = None
    rounding: Rounding = "nearest"
    tolerance: float = DEFAULT_TOLERANCE
    seed: int = 0
    fused: str = "split"
    skip_non_finite: bool = False
    _compiled: dict[str, re.Pattern[str]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        set_value = object.__setattr__  # frozen: normalised once, here
        set_value(self, "rank", _rule(self.rank))
        set_value(self, "alpha", check_alpha(self.alpha))
        set_value(self, "include", tuple(self.include))
        set_value(self, "exclude", tuple(self.exclude))
        set_value(self, "rank_pattern", tuple((pattern, _rule(rank)) for pattern, rank in self.rank_pattern))
        set_value(self, "alpha_pattern", tuple((pattern, check_alpha(alpha, f"alpha for {pattern!r}")) for pattern, alpha in self.alpha_pattern))
        if self.alpha == 0 and not any(alpha for _, alpha in self.alpha_pattern):
            raise RecipeError("alpha is 0: the output would be the aligned model unchanged; use a number > 0, such as 1.25 (the paper's).")
        if self.dtype is not None and self.dtype not in OUTPUT_DTYPES:
            raise RecipeError(f"dtype {self.dtype!r} is not supported; use one of {', '.join(OUTPUT_DTYPES)}, or leave it out to keep aligned's.")
        if self.rounding not in ROUNDINGS:
            raise RecipeError(f"rounding {self.rounding!r} is not known; use one of {', '.join(ROUNDINGS)}.")
        if self.rounding == "feedback" and any(_rule(rank).kind == "full" for rank in (self.rank, *(rank for _, rank in self.rank_pattern))):
            raise RecipeError("rounding 'feedback' needs a limited rank: with rank 'full' use --rounding stochastic or --dtype float32.")
        if self.fused not in ("split", "whole"):
            raise RecipeError(f"fused {self.fused!r} is not known; use 'split' or 'whole'.")
        if not (math.isfinite(self.tolerance) and 0 < self.tolerance < 1):
            raise RecipeError(f"tolerance is {self.tolerance:g}; use a number in (0, 1), such as 1e-3.")
        for option, patterns in self.patterns().items():
            for pattern in patterns:
                self._compiled[pattern] = compile_pattern(pattern, option)

    def patterns(self) -> dict[str, tuple[str, ...]]:
        """Every regular expression of the recipe by the option that gave it."""
        return {
            "--include": self.include,
            "--exclude": self.exclude,
            "--rank-pattern": tuple(pattern for pattern, _ in self.rank_pattern),
            "--alpha-pattern": tuple(pattern for pattern, _ in self.alpha_pattern),
        }

    def matches(self, pattern: str, name: str) -> bool:
        return self._compiled[pattern].search(name) is not None

    def rank_for(self, name: str) -> RankRule:
        return next((_rule(rank) for pattern, rank in self.rank_pattern if self.matches(pattern, name)), _rule(self.rank))

    def alpha_for(self, name: str) -> float:
        return next((alpha for pattern, alpha in self.alpha_pattern if self.matches(pattern, name)), self.alpha)

    def with_rank(self, rank: RankRule | int | str) -> Recipe:
        return replace(self, rank=rank)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Recipe:
        """The recipe that `to_json` wrote. Raises RecipeError for settings that this version does not know."""
        known = {name for name, part in cls.__dataclass_fields__.items() if part.init}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise RecipeError(f"the recipe has settings that this version does not know: {', '.join(unknown)}; use the version that wrote it.")
        pairs: dict[str, Any] = {name: _pairs(values[name]) for name in ("rank_pattern", "alpha_pattern") if name in values}
        return cls(**{**values, **pairs})

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the manifest and for comparing two requests."""
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
        }


def _pairs(values: list[list[Any]]) -> tuple[tuple[str, Any], ...]:
    return tuple((str(pattern), value) for pattern, value in values)


def _rule(rank: RankRule | int | str) -> RankRule:
    return rank if isinstance(rank, RankRule) else parse_rank(rank)
