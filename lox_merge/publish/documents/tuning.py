"""What `lox-merge search --tune --json` writes."""

from __future__ import annotations

from typing import Any

from lox_merge.publish.documents.robustness import Attack, Training
from lox_merge.publish.documents.shape import AttackRate, Prompts, Shape, judge_title, source_title


class Setting(Shape):
    """Rank and alpha of a trial, and those of groups of tensors by regular expression."""

    rank: str
    alpha: float
    rank_pattern: tuple[tuple[str, str], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    @property
    def words(self) -> str:
        alphas = dict(self.alpha_pattern)
        groups = [f"{pattern}: {rank}, {alphas[pattern]:g}" if pattern in alphas else f"{pattern}: {rank}" for pattern, rank in self.rank_pattern]
        return "; ".join([f"{self.rank}, {self.alpha:g}", *groups])


class Trial(Shape):
    """One setting: ASR after the attack, and KL from aligned before it. on_front: no other trial beats it in both."""

    number: int
    recipe: Setting
    attack: AttackRate
    divergence: float
    on_front: bool


class Tuning(Shape):
    """A study. aligned: the same attack on the aligned model. failed: trials without figures, with the reason."""

    sources: dict[str, dict[str, Any]]
    attack: Attack
    training: Training
    prompts: Prompts
    harmless: Prompts
    judge: dict[str, Any]
    aligned: AttackRate
    front: tuple[int, ...]
    trials: tuple[Trial, ...]
    failed: dict[str, str]

    @property
    def aligned_title(self) -> str:
        return source_title(self.sources.get("aligned") or {})

    @property
    def judge_name(self) -> str:
        return judge_title(self.judge)

    @property
    def best(self) -> list[Trial]:
        """The trials on the front, the safest first."""
        by_number = {trial.number: trial for trial in self.trials}
        return [by_number[number] for number in self.front if number in by_number]
