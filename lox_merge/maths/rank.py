"""Rules that say how many singular directions are kept: a number, a share, an energy, or what stands above rounding noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lox_merge.errors import RecipeError

RankKind = Literal["fixed", "full", "percent", "energy", "noise-floor"]

_HELP = "use a whole number ≥ 1, 'full', a percentage such as '10%', 'energy:0.9', or 'noise-floor'"


@dataclass(frozen=True)
class RankRule:
    """How the rank k of one matrix follows from its shape or its spectrum.

    fixed: k = value. percent: k = max(1, round(value/100 · min(d_out, d_in))). energy: the fewest directions that hold
    `value` of the squared Frobenius norm. noise-floor: the directions above the Marchenko-Pastur edge of the rounding
    noise of the stored dtype. full: all of the delta, no SVD (ExPO, arXiv 2404.16792).
    """

    kind: RankKind
    value: float = 0.0

    def __post_init__(self) -> None:
        problem = None
        if self.kind not in get_args(RankKind):
            problem = f"rank rule {self.kind!r} is not known"
        elif self.kind == "fixed" and (self.value < 1 or self.value != int(self.value)):
            problem = f"rank {_exact(self.value)} is not a whole number ≥ 1"
        elif self.kind == "percent" and not 0 < self.value <= 100:
            problem = f"rank {_exact(self.value)}% is outside (0, 100]"
        elif self.kind == "energy" and not 0 < self.value < 1:
            problem = f"energy {_exact(self.value)} is outside (0, 1)"
        if problem:
            raise RecipeError(f"{problem}; {_HELP}.")

    def __str__(self) -> str:
        if self.kind == "fixed":
            return str(int(self.value))
        if self.kind == "percent":
            return f"{_exact(self.value)}%"
        return f"energy:{_exact(self.value)}" if self.kind == "energy" else self.kind

    def from_shape(self, short_side: int) -> int | None:
        """k where the shape alone decides it, clipped to the short side; None where the spectrum decides."""
        if self.kind == "fixed":
            return min(int(self.value), short_side)
        if self.kind == "percent":
            return max(1, min(short_side, round(self.value / 100 * short_side)))
        return short_side if self.kind == "full" else None

    def from_spectrum(self, squares: Tensor, total: float, noise_edge: float) -> int | None:
        """k from the leading squared singular values, descending; None when more of them are needed to tell.

        squares: (j,) float64. total: ||A||²_F. noise_edge: largest singular value that noise alone would give.
        """
        if self.kind == "energy":
            reached = torch.cumsum(squares, 0) >= self.value * total
            return int(reached.to(torch.uint8).argmax()) + 1 if bool(reached.any()) else None
        above = int((squares > noise_edge**2).sum())
        return above if above < squares.numel() else None


def _exact(value: float) -> str:
    """The shortest text that is read back as this number: a recipe on record has to be the one that was used."""
    return repr(float(value)).removesuffix(".0")


def rank_rule(rank: RankRule | int | str) -> RankRule:
    """A rule as it is, a number or a text as the rule that it stands for. Raises RecipeError."""
    return rank if isinstance(rank, RankRule) else parse_rank(rank)


def parse_rank(text: str | int) -> RankRule:
    """'6', 'full', '10%', 'energy:0.9' or 'noise-floor' as a rule. Raises RecipeError with the allowed forms."""
    word = str(text).strip().lower()
    if word in ("full", "noise-floor"):
        return RankRule("full" if word == "full" else "noise-floor")
    try:
        if word.endswith("%"):
            kind, value = "percent", float(word[:-1])
        elif word.startswith("energy:"):
            kind, value = "energy", float(word.removeprefix("energy:"))
        else:
            kind, value = "fixed", float(word)
        if math.isfinite(value):
            return RankRule(kind, value)  # type: ignore[arg-type]
    except ValueError:
        pass
    raise RecipeError(f"rank {str(text)!r} is not understood; {_HELP}.")
