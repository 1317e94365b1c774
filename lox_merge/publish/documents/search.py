"""What `lox-merge search --json` writes."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from lox_merge.publish.documents.shape import AttackRate, Number, Prompts, Shape, judge_title, source_title


class RankPoint(Shape):
    """base + Proj_rank(delta) measured; the fields are those of safety.search.RankPoint."""

    rank: int
    attack: AttackRate
    increase: float | None
    upper_bound: float | None
    accepted: bool
    mean_r_align: float | None
    energy_r_align: float | None
    utility: dict[str, float | None]


class NoiseFloor(Shape):
    """Ranks above rounding noise over all matrices; None where more triplets than are held would be needed to tell."""

    median: int | None
    smallest: int | None
    largest: int | None
    open: int


class Search(Shape):
    """A rank search. curve: by rising rank."""

    effective_rank: int | None
    rho: Number
    confident: bool
    judge: dict[str, Any]
    prompts: Prompts
    model: dict[str, Any]
    aligned: AttackRate
    aligned_utility: dict[str, float | None]
    curve: tuple[RankPoint, ...] = Field(min_length=1)
    noise_floor: NoiseFloor
    notes: tuple[str, ...]

    @property
    def aligned_title(self) -> str:
        return source_title(self.model.get("source") or {})

    @property
    def judge_name(self) -> str:
        return judge_title(self.judge)
