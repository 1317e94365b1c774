"""What `lox-merge demo --json` and `demo --full --json` write."""

from __future__ import annotations

from pydantic import Field

from lox_merge.publish.documents.attack_success import Evaluation
from lox_merge.publish.documents.robustness import Robustness
from lox_merge.publish.documents.search import Search
from lox_merge.publish.documents.shape import Shape


class Demo(Shape):
    """One toy pair: its rank search, and comparisons under attack. base: the pre-trained model."""

    seed: int
    seed_was_used_for_tuning: bool
    parameters: int
    base: Evaluation
    search: Search
    attacks: tuple[Robustness, ...] = Field(min_length=1)


class Spread(Shape):
    """One figure over seeds."""

    median: float
    mean: float
    lowest: float
    highest: float


class FullDemo(Shape):
    """Several toy pairs. over_seeds: by measure, model and stage; None where undefined on some seed. runs: one a seed."""

    seeds: tuple[int, ...] = Field(min_length=1)
    seeds_used_for_tuning: tuple[int, ...]
    effective_ranks: tuple[int | None, ...]
    over_seeds: dict[str, dict[str, dict[str, Spread | None]]]
    runs: tuple[Demo, ...] = Field(min_length=1)
