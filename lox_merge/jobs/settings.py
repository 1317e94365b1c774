"""The settings that every edit of a checkpoint shares: which tensors, which dtype, how values are rounded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from lox_merge.checkpoint import patterns
from lox_merge.checkpoint.dtypes import OUTPUT_DTYPES
from lox_merge.errors import RecipeError
from lox_merge.maths.rounding import ROUNDINGS, Rounding
from lox_merge.typed_fields import check_fields

DEFAULT_TOLERANCE = 1e-3
# What torch.Generator takes.
_SEEDS = -(2**63), 2**64 - 1


def compile_pattern(pattern: str, option: str) -> Any:
    """A regular expression. Raises RecipeError with the option and the reason."""
    try:
        return patterns.compile_pattern(pattern)
    except ValueError as error:
        raise RecipeError(f"{option} {error}.") from None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a recipe of any edit says beside the edit itself.

    include, exclude: regular expressions searched in tensor names; a tensor is edited if some `include` (or none is
    given) and no `exclude` matches. linear_only: leave embeddings, lm_head and convolutions alone. dtype: output dtype,
    None keeps each tensor's. tolerance: relative Frobenius error wanted of Proj_k(Δ). fused: 'split' takes gate and up
    fused inside stacked experts as two matrices. skip_non_finite: copy tensors whose delta holds NaN or Inf instead of
    failing. Raises RecipeError for anything else.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    linear_only: bool = False
    dtype: str | None = None
    rounding: Rounding = "nearest"
    tolerance: float = DEFAULT_TOLERANCE
    seed: int = 0
    fused: str = "split"
    skip_non_finite: bool = False
    _compiled: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dtype is not None and self.dtype not in OUTPUT_DTYPES:
            raise RecipeError(
                f"dtype {self.dtype!r} is not supported; use one of {', '.join(OUTPUT_DTYPES)}, or leave it out to keep the stored ones."
            )
        if self.rounding not in ROUNDINGS:
            raise RecipeError(f"rounding {self.rounding!r} is not known; use one of {', '.join(ROUNDINGS)}.")
        if self.fused not in ("split", "whole"):
            raise RecipeError(f"fused {self.fused!r} is not known; use 'split' or 'whole'.")
        if not (math.isfinite(self.tolerance) and 0 < self.tolerance < 1):
            raise RecipeError(f"tolerance is {self.tolerance:g}; use a number in (0, 1), such as 1e-3.")
        if not _SEEDS[0] <= self.seed <= _SEEDS[1]:
            raise RecipeError(f"the seed is none of 64 bits; use a whole number from {_SEEDS[0]} to {_SEEDS[1]}.")
        for option, given in self.patterns().items():
            for pattern in given:
                self._compiled[pattern] = compile_pattern(pattern, option)

    def patterns(self) -> dict[str, tuple[str, ...]]:
        """Every regular expression of the recipe by the option that gave it."""
        return {"--include": self.include, "--exclude": self.exclude}

    def matches(self, pattern: str, name: str) -> bool:
        try:
            return patterns.found(self._compiled[pattern], name)
        except ValueError as error:
            raise RecipeError(f"{error}.") from None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the manifest and for comparing two requests."""
        raise NotImplementedError

    @classmethod
    def check_known(cls, values: dict[str, Any]) -> None:
        """Raises RecipeError where `values`, a recipe of a manifest, has settings that this version does not know."""
        known = {name for name, part in cls.__dataclass_fields__.items() if part.init}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise RecipeError(f"the recipe has settings that this version does not know: {', '.join(unknown)}; use the version that wrote it.")

    @staticmethod
    def not_understood(error: Exception) -> RecipeError:
        """The error for a recorded recipe whose values are of another kind than a recipe's."""
        return RecipeError(f"the recipe on record is damaged: {str(error).rstrip('.')}. Restore the file that it stands in.")
