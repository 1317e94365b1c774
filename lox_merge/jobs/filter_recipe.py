"""What a user asks of the projection filter: its settings, checked on construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lox_merge.errors import RecipeError
from lox_merge.jobs.settings import Settings
from lox_merge.maths.directions import BASES, Basis, rank_of_fraction
from lox_merge.maths.filter import MODES, Mode
from lox_merge.maths.subspace import Side
from lox_merge.typed_fields import FieldError, check_choice

Projector = Literal["subspace", "safe-lora"]
Below = Literal["project", "merge"]
# SafeMERGE's published setting: 0.8 of the fine-tuned update, 0.2 of the safe one.
DEFAULT_MERGE_WEIGHT = 0.2
_OWN = ("mode", "fraction", "rank", "basis", "side", "threshold", "layers", "projector", "below", "merge_weight")
_SHARED = ("include", "exclude", "linear_only", "dtype", "rounding", "tolerance", "seed", "fused", "skip_non_finite")


@dataclass(frozen=True)
class FilterRecipe(Settings):
    """Settings of the projection filter; see lox_merge.maths.filter for the formulas.

    mode: 'orthogonal' (take P(Δ_ft) out) or 'parallel' (keep nothing else); None is parallel for Safe LoRA's settings, else
    orthogonal. fraction in (0, 1): k = max(1, round(f · short side)); or rank: k itself. basis: 'top', 'random-k', 'random'.
    side: 'left' projects in the output space of the layer, 'right' in its input space, however it is stored.
    threshold, layers: Safe LoRA (arXiv 2405.16833): only matrices with cos(P(Δ_ft), Δ_ft) ≤ threshold, or the `layers` with
    the smallest cosine, are changed; all others stay as fine-tuned. projector: 'subspace' (P above, idempotent) or 'safe-lora'
    (the authors' ΔΔᵀ/‖Δ‖_F, no rank). below: 'project', or 'merge' as SafeMERGE (arXiv 2503.17239) does, with `merge_weight`
    as the aligned model's share. Raises RecipeError for anything else.
    """

    mode: Mode | None = None
    fraction: float | None = None
    rank: int | None = None
    basis: Basis = "top"
    side: Side = "left"
    threshold: float | None = None
    layers: int | None = None
    projector: Projector = "subspace"
    below: Below = "project"
    merge_weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choices: dict[str, tuple[str, ...]] = {"basis": BASES, "side": get_args(Side), "projector": get_args(Projector), "below": get_args(Below)}
        for name, allowed in choices.items():
            check_choice(name, getattr(self, name), allowed)
        object.__setattr__(self, "mode", self.mode or ("parallel" if self.by_layer or self.projector == "safe-lora" else "orthogonal"))
        check_choice("mode", self.mode, MODES)
        self._check_size()
        self._check_layers()

    @property
    def by_layer(self) -> bool:
        """Whether each layer is decided by its cosine (Safe LoRA, SafeMERGE)."""
        return self.threshold is not None or self.layers is not None

    def _check_size(self) -> None:
        if self.projector == "safe-lora":
            if self.fraction is not None or self.rank is not None or self.basis != "top":
                raise RecipeError("projector 'safe-lora' is ΔΔᵀ/‖Δ‖ of the whole delta: it takes no fraction, rank or other basis.")
            if self.rounding == "feedback":
                raise RecipeError("rounding 'feedback' needs a limited rank: with projector 'safe-lora' use stochastic, or dtype float32.")
            return
        if (self.fraction is None) == (self.rank is None):
            raise RecipeError("give either a fraction of the short side, such as 0.1, or a rank: how many directions of the delta make the subspace.")
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise RecipeError(f"fraction is {self.fraction:g}; use a number in (0, 1), such as 0.1: the share of the short side of each matrix.")
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"rank {self.rank} is not a whole number ≥ 1.")

    def _check_layers(self) -> None:
        if self.threshold is not None and self.layers is not None:
            raise RecipeError("threshold and layers are two ways to choose layers; give one of them.")
        if self.threshold is not None and not (math.isfinite(self.threshold) and -1 <= self.threshold <= 1):
            raise RecipeError(f"threshold is {self.threshold:g}; it is a cosine, so use a number in [-1, 1], such as 0.35.")
        if self.layers is not None and self.layers < 1:
            raise RecipeError(f"layers is {self.layers}; use a whole number ≥ 1: how many layers are projected.")
        if (self.by_layer or self.projector == "safe-lora") and self.mode != "parallel":
            raise RecipeError("Safe LoRA keeps what lies in the alignment subspace: threshold, layers and 'safe-lora' go with mode parallel.")
        if self.below == "merge":
            if not self.by_layer:
                raise RecipeError("below 'merge' says what happens to layers below a threshold: give threshold or layers too.")
            if self.rounding == "feedback":
                raise RecipeError("rounding 'feedback' needs a limited rank: with below 'merge' use stochastic, or dtype float32.")
            weight = DEFAULT_MERGE_WEIGHT if self.merge_weight is None else self.merge_weight
            if not (math.isfinite(weight) and 0 < weight <= 1):
                raise RecipeError(f"merge_weight is {weight:g}; use the aligned model's share, a number in (0, 1], such as 0.2.")
            object.__setattr__(self, "merge_weight", float(weight))
        elif self.merge_weight is not None:
            raise RecipeError("merge_weight is the aligned model's share in a merge: it goes with below 'merge'.")

    def rank_for(self, shape: tuple[int, int]) -> int | None:
        """k of a matrix; None where the whole delta is used (projector 'safe-lora'). May be above the short side for a given rank."""
        if self.fraction is not None:
            return rank_of_fraction(self.fraction, min(shape))
        return self.rank

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> FilterRecipe:
        """The recipe that `to_json` wrote. Raises RecipeError for settings that this version does not know."""
        cls.check_known(values)
        try:
            return cls(**values)
        except (FieldError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise cls.not_understood(error) from error

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in (*_OWN, *_SHARED)}
        return values | {"include": list(self.include), "exclude": list(self.exclude)}
