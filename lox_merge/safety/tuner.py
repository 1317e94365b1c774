"""One trial of a tuning after another: a fresh aligned model, hardened in memory, its divergence, the attack, its success."""

from __future__ import annotations

import gc
import importlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from lox_merge.errors import LoxMergeError, LoxMergeWarning, RequestError
from lox_merge.jobs.harden import with_recipe
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.recipe import Recipe
from lox_merge.safety.asr import evaluate
from lox_merge.safety.attack import AttackSettings, fine_tune
from lox_merge.safety.cache import VerdictCache
from lox_merge.safety.conversations import Conversations
from lox_merge.safety.divergence import Reference, kl_divergence
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.starting_points import ALIGNED, HARDENED, set_starting_point
from lox_merge.safety.tune_study import ALIGNED_KEY, ATTACK, FAILURE, SECONDS, tuning_of
from lox_merge.safety.tuning import TuneSpace, Tuning
from lox_merge.safety.types import AttackSuccess, Judge, PromptSet


class Tuner:
    """Measures one recipe at a time. reference: aligned's expectations on harmless prompts. plan: which matrices, and their triplets."""

    def __init__(
        self,
        load: Callable[[], LocalModel],
        plan: Plan,
        prompts: PromptSet,
        judge: Judge,
        reference: Reference,
        attack: Conversations,
        examples: Sequence[dict[str, list[int]]],
        settings: AttackSettings,
        *,
        seed: int = 0,
        cache: VerdictCache | None = None,
    ) -> None:
        self._load, self._plan, self._prompts, self._judge, self._reference = load, plan, prompts, judge, reference
        self._attack, self._examples, self._settings, self._seed, self._cache = attack, examples, settings, seed, cache

    def measure(self, recipe: Recipe | None) -> tuple[AttackSuccess, float]:
        """Success after the attack and divergence before it; None: of the aligned model itself."""
        gc.collect()  # the trainer's cycles keep the last model until then
        source = self._load()
        if recipe is not None:
            set_starting_point(source.model, with_recipe(self._plan, recipe), HARDENED)
        divergence = kl_divergence(self._reference, source.model).value
        found: list[AttackSuccess] = []

        def observe(_step: int, model: Any) -> None:
            source.model = model
            found.append(evaluate(source, self._prompts, [self._judge], cache=self._cache).attack_success[self._judge.name])

        model, tokenizer, rendering = source.model, source.tokenizer, source.rendering
        fine_tune(model, tokenizer, self._attack, self._settings, observe, seed=self._seed, rendering=rendering, examples=self._examples)
        if found[-1].rate is None or divergence is None:
            raise LoxMergeError(f"the judge {self._judge.name} decided on none of {found[-1].n} replies after the attack.")
        return found[-1], divergence


def run_trials(study: Any, space: TuneSpace, tuner: Tuner, recipe: Recipe, trials: int, *, report: Callable[[str], None] | None = None) -> Tuning:
    """Goes on with a study until it has `trials` finished ones. Raises LoxMergeError when the aligned model cannot be measured."""
    optuna = importlib.import_module("optuna")
    say = report or (lambda _text: None)
    finished, failed = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL
    if ALIGNED_KEY not in study.user_attrs:
        say(f"{ALIGNED}, attacked")
        attack, _ = tuner.measure(None)
        study.set_user_attr(ALIGNED_KEY, asdict(attack))
    # A process that was killed leaves the trial that it was at, and that was the first one if there is no other.
    if all(trial.state == optuna.trial.TrialState.RUNNING for trial in study.get_trials(deepcopy=False)):
        study.enqueue_trial(space.default())
    attempts = trials - len(study.get_trials(deepcopy=False, states=[finished]))
    for _ in range(max(0, attempts)):
        trial = study.ask()
        chosen = space.suggest(trial)
        say(f"trial {trial.number}: {', '.join(f'{name} {value:g}' for name, value in chosen.items())}")
        started = time.perf_counter()
        try:
            attack, divergence = tuner.measure(space.recipe(chosen, recipe))
        except LoxMergeError as error:
            if isinstance(error, RequestError):
                raise
            warnings.warn(f"trial {trial.number} has no figures: {error}", LoxMergeWarning, stacklevel=2)
            trial.set_user_attr(FAILURE, str(error))
            study.tell(trial, state=failed)
            continue
        trial.set_user_attr(ATTACK, asdict(attack))
        trial.set_user_attr(SECONDS, time.perf_counter() - started)
        study.tell(trial, (attack.rate, divergence))
    return tuning_of(study)
