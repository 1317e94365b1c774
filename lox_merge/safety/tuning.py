"""Rank and alpha chosen together: attack success after a short fine-tuning attack against divergence on harmless prompts.

Optuna proposes (rank, alpha), of all matrices or of groups of them; both objectives are minimised and none is preferred: the
result is the trials that no other beats in both (Pareto front), and the choice is the user's. Everything happens in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lox_merge.errors import RequestError
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.settings import compile_pattern
from lox_merge.safety.types import AttackSuccess
from lox_merge.typed_fields import check_fields

# Figures of an alpha beyond these are noise of the attack, and a command line with them would be hard to read.
_ALPHA_DIGITS = 3


@dataclass(frozen=True)
class TuneSpace:
    """What may be chosen: ranks and alphas, both ends included; groups: regular expressions whose tensors get a rank and alpha of their own.

    Where several groups match a name, the first decides, as in a recipe. Raises RequestError.
    """

    ranks: tuple[int, int] = (1, 16)
    alphas: tuple[float, float] = (0.25, 2.0)
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if not 1 <= self.ranks[0] <= self.ranks[1]:
            raise RequestError(f"ranks from {self.ranks[0]} to {self.ranks[1]} leave nothing to choose; give two numbers, the first one 1 or more.")
        if not 0 < self.alphas[0] <= self.alphas[1] < float("inf"):
            raise RequestError(f"alphas from {self.alphas[0]:g} to {self.alphas[1]:g}: both must be finite and above 0, the first not the larger.")
        if self.alphas[0] < 10**-_ALPHA_DIGITS:
            raise RequestError(f"alphas are told apart to {10**-_ALPHA_DIGITS:g}, and {self.alphas[0]:g} is less; begin with that or more.")
        if len(set(self.groups)) < len(self.groups):
            raise RequestError("a group is named twice; name each once.")
        for pattern in self.groups:
            compile_pattern(pattern, "--group")

    def suggest(self, trial: Any) -> dict[str, float]:
        """Parameters of an optuna trial: 'rank', 'alpha', and for each group 'rank REGEX', 'alpha REGEX'."""
        chosen: dict[str, float] = {}
        for suffix in ("", *(f" {group}" for group in self.groups)):
            chosen[f"rank{suffix}"] = trial.suggest_int(f"rank{suffix}", *self.ranks)
            chosen[f"alpha{suffix}"] = round(trial.suggest_float(f"alpha{suffix}", *self.alphas), _ALPHA_DIGITS)
        return chosen

    def default(self) -> dict[str, float]:
        """The paper's setting, moved into the space."""
        rank = min(max(6, self.ranks[0]), self.ranks[1])
        alpha = min(max(1.25, self.alphas[0]), self.alphas[1])
        suffixes = ("", *(f" {group}" for group in self.groups))
        return {f"{name}{suffix}": value for suffix in suffixes for name, value in (("rank", rank), ("alpha", alpha))}

    def recipe(self, chosen: Mapping[str, float], recipe: Recipe) -> Recipe:
        """`recipe` with the chosen ranks and alphas."""
        settings = recipe.to_json()
        return Recipe.from_json(
            {
                **settings,
                "rank": str(int(chosen["rank"])),
                "alpha": round(chosen["alpha"], _ALPHA_DIGITS),
                "rank_pattern": [[group, str(int(chosen[f"rank {group}"]))] for group in self.groups],
                "alpha_pattern": [[group, round(chosen[f"alpha {group}"], _ALPHA_DIGITS)] for group in self.groups],
            }
        )


@dataclass(frozen=True)
class TuneTrial:
    """One setting measured. attack: success after the fine-tuning attack; divergence: KL from aligned before it, nats a position.

    on_front: no other trial is better in one and no worse in the other. seconds: wall time.
    """

    number: int
    recipe: Recipe
    attack: AttackSuccess
    divergence: float
    on_front: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"recipe": self.recipe.to_json()}


@dataclass(frozen=True)
class Tuning:
    """A study so far. aligned: success of the same attack on the aligned model, whose divergence is 0. identity: what was asked.

    trials: finished ones by number. failed: numbers of trials without figures, with the reason.
    """

    identity: dict[str, Any]
    aligned: AttackSuccess
    trials: tuple[TuneTrial, ...]
    failed: dict[int, str]

    @property
    def front(self) -> tuple[TuneTrial, ...]:
        """The trials on the front, the safest first."""
        return tuple(sorted((trial for trial in self.trials if trial.on_front), key=lambda trial: (trial.attack.rate or 0.0, trial.divergence)))

    def trial(self, number: int) -> TuneTrial:
        """Raises RequestError for a number that is no finished trial."""
        for trial in self.trials:
            if trial.number == number:
                return trial
        known = ", ".join(str(trial.number) for trial in self.front)
        raise RequestError(f"there is no finished trial {number} in this study. Those on the front are {known or 'none'}.")

    def to_json(self) -> dict[str, Any]:
        return {
            **self.identity,
            "aligned": asdict(self.aligned),
            "front": [trial.number for trial in self.front],
            "trials": [trial.to_json() for trial in self.trials],
            "failed": {str(number): reason for number, reason in self.failed.items()},
        }
