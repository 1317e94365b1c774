"""The moments of a demo that tables show: which attack, after how many steps, and what a model did then."""

from __future__ import annotations

from dataclasses import dataclass

from lox_merge.lab.attacks import BENIGN, HARMFUL
from lox_merge.lab.demo import DemoResult
from lox_merge.lab.measure import CARRIED_OUT, NEW_TASK, NOT_REFUSED, OLD_TASK
from lox_merge.lab.requests import TEST_REQUESTS
from lox_merge.safety.robustness import Curve, Point
from lox_merge.safety.statistics import wilson
from lox_merge.safety.types import AttackSuccess


@dataclass(frozen=True)
class Rate:
    """`successes` of `n`."""

    successes: int
    n: int

    @property
    def value(self) -> float | None:
        """The share; None for n = 0, where a 0 would read as a measured "never"."""
        return self.successes / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson 95 %; None for n = 0. Requests count as independent draws: it says nothing about another seed."""
        return wilson(self.successes, self.n)

    @classmethod
    def of(cls, figures: AttackSuccess) -> Rate:
        return cls(figures.successes, figures.judged)


@dataclass(frozen=True)
class Stage:
    """One column of the tables. useful: which task counts as utility then (the one that benign fine-tuning teaches, after it)."""

    heading: str
    attack: str
    step: int
    useful: str = OLD_TASK

    def curve(self, result: DemoResult, model: str) -> Curve:
        attacked = result.benign if self.attack == BENIGN else result.harmful
        return attacked.curve(self.attack, model, attacked.seeds[0])

    def point(self, result: DemoResult, model: str) -> Point:
        return self.curve(result, model).point(self.step)

    def not_refused(self, result: DemoResult, model: str) -> Rate:
        return Rate.of(self.point(result, model).evaluation.attack_success[NOT_REFUSED])

    def carried_out(self, result: DemoResult, model: str) -> Rate:
        return Rate.of(self.point(result, model).evaluation.attack_success[CARRIED_OUT])

    def utility(self, result: DemoResult, model: str) -> Rate:
        share = self.point(result, model).utility[self.useful]
        return Rate(0, 0) if share is None else Rate(round(share * TEST_REQUESTS), TEST_REQUESTS)

    def dispersion(self, result: DemoResult, model: str) -> float | None:
        """R_ft/R_align."""
        return self.curve(result, model).dispersion(self.step)

    @property
    def name(self) -> str:
        return f"{self.step} {self.attack} steps"


STAGES = (
    Stage("before", BENIGN, 0),
    Stage("benign\n100 steps", BENIGN, 100, NEW_TASK),
    Stage("benign\n150 steps", BENIGN, 150, NEW_TASK),
    Stage("harmful\n20 steps", HARMFUL, 20),
    Stage("harmful\n50 steps", HARMFUL, 50),
)
COMPARED = (STAGES[1], STAGES[3])
