"""What `lox-merge brittleness --json` writes."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from lox_merge.publish.documents.shape import AttackRate, PairedChange, Prompts, Shape, judge_title, source_title

LEADING = "leading"


class RemovalPoint(Shape):
    """Aligned without `rank` directions; the fields are those of safety.brittleness.RemovalPoint."""

    directions: str
    draw: int | None
    rank: int
    attack: AttackRate
    against_aligned: PairedChange
    against_leading: PairedChange | None
    mean_removed: float | None
    energy_removed: float | None
    realised_gain: float | None
    utility: dict[str, float | None]

    def clearly(self, level: float, *, below_leading: bool = False) -> bool:
        """Whether its ASR is above aligned's, or below that of the leading directions, by the exact paired test at `level`."""
        change = self.against_leading if below_leading else self.against_aligned
        return change is not None and change.p_value is not None and change.p_value < level and (change.difference or 0) > 0


class Brittleness(Shape):
    """A brittleness probe. ranks: with 0, which is aligned itself; rises: smallest rank above aligned, by curve, None for none."""

    sources: dict[str, dict[str, Any]]
    judge: dict[str, Any]
    prompts: Prompts
    model: dict[str, Any]
    ranks: tuple[int, ...] = Field(min_length=2)
    controls: tuple[str, ...]
    draws: int
    seed: int
    level: float
    aligned: AttackRate
    aligned_utility: dict[str, float | None]
    points: tuple[RemovalPoint, ...] = Field(min_length=1)
    notes: tuple[str, ...]

    @property
    def leading(self) -> list[RemovalPoint]:
        return [point for point in self.points if point.directions == LEADING]

    def drawn(self, control: str, rank: int) -> list[RemovalPoint]:
        """Every draw of a control at one rank."""
        return [point for point in self.points if (point.directions, point.rank) == (control, rank)]

    @property
    def rise(self) -> RemovalPoint | None:
        """The smallest rank where the leading directions' ASR is above aligned's."""
        return next((point for point in self.leading if point.clearly(self.level)), None)

    def title(self, role: str) -> str:
        return source_title(self.sources.get(role) or {})

    @property
    def judge_name(self) -> str:
        return judge_title(self.judge)
