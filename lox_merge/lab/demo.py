"""The demo: train a toy pair, harden its files, attack the models in memory, and compare with equal-norm controls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lox_merge.errors import OutputError
from lox_merge.jobs.harden import harden
from lox_merge.jobs.recipe import Recipe
from lox_merge.lab.attacks import benign_attack, harmful_attack, run_attack
from lox_merge.lab.checkpoints import ToyPair, toy_pair
from lox_merge.lab.controls import Control, edited_state
from lox_merge.lab.measure import CONFIDENCE, Measurement, Rate, measure
from lox_merge.lab.models import load_model, one_thread, weights, with_weights
from lox_merge.lab.recipe import ToyRecipe
from lox_merge.lab.requests import draw_requests

RANK, ALPHA = 6, 1.25
# The seeds whose results were looked at while the laboratory's settings were chosen.
TUNED_SEEDS = range(8)
ALIGNED, HARDENED, FULL_RANK, GAUSSIAN = "aligned", "LoX-hardened", "full-rank", "Gaussian"
CONTROLS: dict[str, Control] = {FULL_RANK: "full-rank", GAUSSIAN: "gaussian"}

Curve = dict[int, Measurement]


@dataclass(frozen=True)
class Condition:
    """One starting point of the attacks. benign, harmful: measurements by attack step, step 0 before the attack."""

    name: str
    benign: Curve
    harmful: Curve


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured. conditions: aligned, LoX-hardened, then the controls. seconds: wall time, training included."""

    recipe: ToyRecipe
    parameters: int
    base: Measurement
    conditions: tuple[Condition, ...]
    hardened: Path
    seconds: float

    def condition(self, name: str) -> Condition:
        return next(condition for condition in self.conditions if condition.name == name)

    def to_json(self) -> dict[str, Any]:
        """Plain values for --json: every rate with successes, n, value and interval (null where n is 0)."""
        return {
            "command": "demo",
            "seed": self.recipe.seed,
            "seed_was_used_for_tuning": self.recipe.seed in TUNED_SEEDS,
            "parameters": self.parameters,
            "toy_recipe": asdict(self.recipe),
            "rank": RANK,
            "alpha": ALPHA,
            "confidence": CONFIDENCE,
            "interval": "Wilson",
            "hardened": self.hardened.name,
            "seconds": self.seconds,
            "base": _measurement_json(self.base),
            "conditions": [
                {"name": condition.name, "benign": _curve_json(condition.benign), "harmful": _curve_json(condition.harmful)}
                for condition in self.conditions
            ],
        }


def run_demo(out: Path, *, seed: int = 0, cache_dir: Path | None = None, progress: Callable[[str], None] | None = None) -> DemoResult:
    """Train (or take from the cache) the pair of `seed`, harden its files into out/hardened, and attack four models.

    The hardened model is loaded from its folder, as a user would. The controls and everything attacked stay in memory.
    About 40 seconds on one core. Raises OutputError when `out` or the cache cannot be written.
    """
    started = time.perf_counter()
    report = progress or (lambda _message: None)
    recipe = ToyRecipe(seed=seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {out} cannot be made ({error.strerror or error}); name another one with --out.") from error
    with one_thread():  # the controls and the base model's answers too, not only what is trained
        pair = toy_pair(recipe, cache_dir, report)
        report(f"hardening the aligned checkpoint, rank {RANK}, alpha {ALPHA}")
        hardened = harden(pair.base, pair.aligned, out / "hardened", recipe=Recipe(rank=RANK, alpha=ALPHA), device="cpu", overwrite=True).out
        tests = draw_requests(recipe).tests
        attacks = benign_attack(recipe), harmful_attack(recipe)
        conditions = []
        for name, model in _starting_points(pair, hardened, seed).items():
            report(f"attacking {name}: {attacks[0].training.steps} benign steps, {attacks[1].training.steps} harmful steps")
            benign, harmful = (run_attack(model, attack, tests) for attack in attacks)
            conditions.append(Condition(name, benign, harmful))
        base = load_model(pair.base)
        return DemoResult(recipe, base.num_parameters(), measure(base, tests), tuple(conditions), hardened, time.perf_counter() - started)


def _starting_points(pair: ToyPair, hardened: Path, seed: int) -> dict[str, PreTrainedModel]:
    aligned = load_model(pair.aligned)
    before, after = weights(load_model(pair.base)), weights(aligned)
    controls = {name: with_weights(aligned, edited_state(before, after, kind, rank=RANK, alpha=ALPHA, seed=seed)) for name, kind in CONTROLS.items()}
    return {ALIGNED: aligned, HARDENED: load_model(hardened), **controls}


def _curve_json(curve: Curve) -> list[dict[str, Any]]:
    return [{"step": step, **_measurement_json(measurement)} for step, measurement in curve.items()]


def _measurement_json(measurement: Measurement) -> dict[str, Any]:
    return {name: _rate_json(getattr(measurement, name)) for name in Measurement.__dataclass_fields__}


def _rate_json(rate: Rate) -> dict[str, Any]:
    return {"successes": rate.successes, "n": rate.n, "value": rate.value, "interval": rate.interval and list(rate.interval)}
