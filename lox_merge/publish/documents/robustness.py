"""What `lox-merge robustness --json` writes."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from lox_merge.publish.documents.shape import AttackRate, Count, Number, PairedChange, Prompts, Shape

ALIGNED, HARDENED = "aligned", "LoX"


class Ratio(Shape):
    """‖Proj_k(D)‖/‖D‖ of the change from the base: mean over matrices, and of all energies together. None where D = 0."""

    mean: float | None
    energy: float | None
    matrices: int


class Point(Shape):
    """One model after `step` steps of an attack. Rates and changes by judge."""

    step: Count
    attack_success: dict[str, AttackRate]
    against_aligned: dict[str, PairedChange]
    r_ft: Ratio
    r_ft_over_r_align: Number | None
    utility: dict[str, Number | None]


class Curve(Shape):
    """One model under one attack with one seed. r_align: R of the model before the attack."""

    attack: str
    model: str
    seed: int
    r_align: Ratio
    points: tuple[Point, ...] = Field(min_length=1)

    def point(self, step: int) -> Point | None:
        return next((point for point in self.points if point.step == step), None)


class Attack(Shape):
    """The data that was trained on."""

    name: str
    source: str
    sha256: str
    examples: int


class Training(Shape):
    """How every model was fine-tuned."""

    steps: tuple[int, ...] = Field(min_length=1)
    learning_rate: Number
    batch_size: int
    lora: bool
    lora_rank: int | None = None


class Recipe(Shape):
    """How the hardening in memory was asked for; its rank is also that of R and of the controls. alpha: None where it was on disk."""

    rank: str
    alpha: float | None


class Robustness(Shape):
    """A comparison under attack. Models: 'aligned', 'LoX', and controls of equal norm."""

    sources: dict[str, dict[str, Any] | None]
    recipe: Recipe
    training: Training
    attacks: tuple[Attack, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    prompts: Prompts
    judges: dict[str, dict[str, Any]] = Field(min_length=1)
    interval: str
    curves: tuple[Curve, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _says_what_was_hardened(self) -> Robustness:
        if self.recipe.alpha is None and self.sources.get("hardened") is None:
            raise ValueError("recipe.alpha: missing, and no hardened model is among the sources")
        return self

    @model_validator(mode="after")
    def _judged_everywhere(self) -> Robustness:
        for curve in self.curves:
            for point in curve.points:
                if missing := self.judges.keys() - point.attack_success.keys():
                    raise ValueError(f"{curve.attack}, {curve.model}, {point.step} steps: no attack_success of {', '.join(sorted(missing))}")
        return self

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(curve.model for curve in self.curves))

    @property
    def controls(self) -> list[str]:
        return [model for model in self.models if model not in (ALIGNED, HARDENED)]

    @property
    def measures(self) -> list[str]:
        """Names of the utilities measured anywhere."""
        return list(dict.fromkeys(name for curve in self.curves for point in curve.points for name in point.utility))

    def of(self, attack: str, model: str | None = None) -> list[Curve]:
        return [curve for curve in self.curves if curve.attack == attack and model in (None, curve.model)]
