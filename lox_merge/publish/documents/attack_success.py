"""What `lox-merge asr --json` writes."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from lox_merge.publish.documents.shape import AttackRate, Number, PairedChange, Prompts, Shape


class Agreement(Shape):
    """Cohen's kappa of two judges on the n replies both decided; None where undefined."""

    first: str
    second: str
    n: int
    kappa: float | None


class Evaluation(Shape):
    """One model. Rates by judge, and by judge and category of prompt; utility by measure."""

    title: str
    model: dict[str, Any]
    prompts: Prompts
    judges: dict[str, dict[str, Any]]
    attack_success: dict[str, AttackRate] = Field(min_length=1)
    agreement: tuple[Agreement, ...]
    by_category: dict[str, dict[str, AttackRate]] = Field(default_factory=dict)
    utility: dict[str, Number | None] = Field(default_factory=dict)


class AttackSuccess(Shape):
    """Models on the same prompts; comparisons are of the later ones with the first."""

    evaluations: tuple[Evaluation, ...] = Field(min_length=1)
    comparisons: tuple[PairedChange, ...]
