"""Aligned and hardened models under the same fine-tuning attacks: what is left of their safety, step by step."""

from __future__ import annotations

import gc
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lox_merge._version import __version__
from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.errors import LoxMergeError, RequestError
from lox_merge.jobs.factors import Factors, open_factors
from lox_merge.jobs.harden import check_some_delta, plan_hardening
from lox_merge.jobs.manifest import output_identity
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.quantised import form_of
from lox_merge.jobs.recipe import Recipe
from lox_merge.safety.adapted import open_any
from lox_merge.safety.asr import Comparison, categories_json, check_decided, check_judges, compare, evaluate
from lox_merge.safety.attack import AttackSettings, check_attack_packages, fine_tune
from lox_merge.safety.attack_curves import Curve, CurveStore, Point
from lox_merge.safety.cache import VerdictCache
from lox_merge.safety.chat import Rendering
from lox_merge.safety.conversations import Conversations, tokenised
from lox_merge.safety.dispersion import Dispersion, Ratio
from lox_merge.safety.factored import load_aligned
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.seeds import check_seed
from lox_merge.safety.starting_points import ALIGNED, CONTROLS, HARDENED, Control, check_hardened, check_some_edit, set_starting_point
from lox_merge.safety.types import Judge, PromptSet

ModelUtility = Callable[[LocalModel], Mapping[str, float | None]]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Robustness:
    """The result of `compare_under_attack`. sources: of base, aligned and hardened (None: hardened in memory)."""

    sources: Mapping[str, Any]
    recipe: Recipe
    settings: AttackSettings
    attacks: tuple[Conversations, ...]
    seeds: tuple[int, ...]
    curves: tuple[Curve, ...]

    def curve(self, attack: str, model: str, seed: int) -> Curve:
        return next(curve for curve in self.curves if (curve.attack, curve.model, curve.seed) == (attack, model, seed))

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(curve.model for curve in self.curves))

    def comparison(self, curve: Curve, step: int, judge: str) -> Comparison | None:
        """`curve` against the aligned model under the same attack, seed and step, paired on the prompts. None for aligned itself."""
        if curve.model == ALIGNED:
            return None
        return compare(self.curve(curve.attack, ALIGNED, curve.seed).point(step).evaluation, curve.point(step).evaluation, judge)

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is undefined is null. Holds no replies and no path of this machine."""
        first = self.curves[0].points[0].evaluation
        recipe = self.recipe.to_json()
        if self.sources.get("hardened") is not None:
            recipe["alpha"] = None  # a hardening on disk has its own; the rank is that of R and of the controls
        return {
            "lox_merge": __version__,
            "sources": dict(self.sources),
            "recipe": recipe,
            "training": self.settings.to_json(),
            "attacks": [attack.identity() for attack in self.attacks],
            "seeds": list(self.seeds),
            "prompts": first.prompts,
            "judges": first.judges,
            "decoding": first.model.get("decoding"),
            "rendering": first.model.get("rendering"),
            "interval": "Wilson 95 % for a rate, Tango 95 % for a paired difference; over prompts, not over seeds",
            "curves": [self._curve_json(curve) for curve in self.curves],
        }

    def _curve_json(self, curve: Curve) -> dict[str, Any]:
        points = []
        for point in curve.points:
            compared = {judge: self.comparison(curve, point.step, judge) for judge in point.evaluation.verdicts}
            points.append(
                {
                    "step": point.step,
                    "attack_success": {judge: asdict(figures) for judge, figures in point.evaluation.attack_success.items()},
                    "by_category": categories_json(point.evaluation),
                    "against_aligned": {judge: asdict(found) for judge, found in compared.items() if found is not None},
                    "r_ft": asdict(point.r_ft),
                    "r_ft_over_r_align": curve.dispersion(point.step),
                    "utility": dict(point.utility),
                }
            )
        return {"attack": curve.attack, "model": curve.model, "seed": curve.seed, "r_align": asdict(curve.r_align), "points": points}


def compare_under_attack(
    base: str | Path,
    aligned: str | Path,
    hardened: str | Path | None,
    attacks: Sequence[Conversations],
    prompts: PromptSet,
    judges: Sequence[Judge],
    *,
    settings: AttackSettings | None = None,
    recipe: Recipe | None = None,
    factors: str | Path | None = None,
    seeds: Sequence[int] = (0,),
    controls: bool | Sequence[Control] = False,
    model: Mapping[str, Any] | None = None,
    rendering: Rendering | None = None,
    utility: ModelUtility | None = None,
    cache: VerdictCache | None = None,
    curves: Path | None = None,
    device: str = "auto",
    cache_dir: Path | None = None,
    order_is_right: bool = False,
    base_is_right: bool = False,
    report: Report | None = None,
) -> Robustness:
    """Attacks aligned, hardened and, with `controls`, edits of equal norm (all three, or those named): same data, seed, order and steps.

    aligned may be a PEFT adapter over base, hardened one over aligned (base_is_right: although they name another model).
    hardened: the output of a hardening; None hardens in memory as `recipe` says. recipe: also the rank of R and of the controls.
    factors: file of `lox-merge decompose` for this pair; no SVD is spent then.
    model: settings of LocalModel (decoding, batch_size, …). utility: measured beside each ASR. seeds: of the order of the
    examples, the adapters' first values and the random controls. curves: folder that keeps every finished curve, with its replies; the
    same request goes on from them, and another one takes what they have in common (a utility then needs `identity()`). One model in
    memory at a time, float32; attacked weights are never written. Raises RequestError before any attack wherever headers, data and
    packages can tell, LoxMergeError where a judge decides on none of aligned's own replies.
    """
    seeds = [check_seed(seed) for seed in seeds]
    settings, rendering = settings or AttackSettings(), rendering or Rendering()
    check_attack_packages(settings.lora)
    check_judges(judges)
    _check_request(attacks, prompts, seeds)
    store = None if curves is None else CurveStore(curves)
    if store is not None and utility is not None and not hasattr(utility, "identity"):
        raise RequestError("curves can be kept beside a utility with identity() alone: else nothing tells whether they are of the same one.")
    say = report or (lambda _text: None)
    kinds = (ALIGNED, HARDENED, *_controls(controls))
    with open_factors(factors) as held, nullcontext() if store is None else store.told():
        sources: dict[str, Any] = {"order_is_right": order_is_right, "base_is_right": base_is_right, "cache_dir": cache_dir}
        plan, given = _opened(base, aligned, hardened, recipe, held, **sources)

        def load(kind: str, seed: int) -> LocalModel:
            # The hardened folder is applied to the loaded aligned model only where its tensors are edited; others are the same by design.
            chosen = {"dtype": "float32", "rendering": rendering, **(model or {})}
            loaded = load_aligned(plan, aligned, chosen, device=device, cache_dir=cache_dir)
            set_starting_point(loaded.model, plan, kind, hardened=given, seed=seed)
            return loaded

        first = load(ALIGNED, 0)
        # All at once: bad data of the last attack must not cost the first ones.
        examples = {attack.name: tokenised(attack, first.tokenizer, rendering, settings.max_length) for attack in attacks}
        dispersion = Dispersion(first.model, plan)
        if utility is not None:
            utility(first)  # the aligned model is the reference of the KL divergence
        # What every curve depends on beside its own starting point. KL divergence is from aligned.
        common = {} if store is None else _common(first, prompts, judges, settings, utility)
        del first
        found: list[Curve] = []
        for attack, seed, kind in itertools.product(attacks, seeds, kinds):
            gc.collect()  # the trainer's cycles keep the last model until then
            observer = _Observer(load(kind, seed), kind, prompts, judges, dispersion, utility, cache)
            about = {} if store is None else {**common, "attack": attack.identity(), "seed": seed, **observer.identity()}
            curve = store.find(about) if store else None
            say(f"{attack.name}, seed {seed}: {kind}, {f'{max(settings.steps)} steps' if curve is None else 'kept from before'}")
            if curve is None:
                curve = observer.attacked(attack, examples[attack.name], settings, seed)
                if store:
                    store.keep(about, curve)
            del observer
            found.append(curve)
            if curve.batches != next(other for other in found if (other.attack, other.seed) == (attack.name, seed)).batches:
                raise LoxMergeError(f"{kind} was not trained on the same batches as aligned, so they cannot be compared. Please report this.")
    return Robustness(_sources(plan, given), recipe or Recipe(), settings, tuple(attacks), tuple(seeds), tuple(found))


def _common(
    aligned: LocalModel, prompts: PromptSet, judges: Sequence[Judge], settings: AttackSettings, utility: ModelUtility | None
) -> dict[str, Any]:
    return {
        "aligned": aligned.identity()["weights"],
        "prompts": prompts.sha256,
        "judges": {judge.name: judge.identity() for judge in judges},
        "training": settings.to_json(),
        "utility": None if utility is None else utility.identity(),  # type: ignore[attr-defined]
    }


def _opened(
    base: str | Path,
    aligned: str | Path,
    hardened: str | Path | None,
    recipe: Recipe | None,
    factors: Factors | None,
    **sources: Any,
) -> tuple[Plan, Checkpoint | None]:
    """The pair, planned, and the hardened checkpoint where there is one, on disk and compared. Raises RequestError."""
    with tempfile.TemporaryDirectory(prefix="lox-merge-") as scratch:  # the plan wants the name of an output; nothing is written there
        plan = plan_hardening(base, aligned, Path(scratch) / "out", recipe=recipe, factors=factors, form="memory", **sources)
    given = None
    if hardened is not None:
        given = open_any(hardened, "hardened", sources["cache_dir"], adapter_base=plan.aligned, base_is_right=sources["base_is_right"])
        check_hardened(given, plan)
        given.fetch(list(given.weight_headers))
    plan.fetch()
    check_some_delta(plan)
    if given is not None:
        check_some_edit(given, plan)
    return plan, given


def _controls(chosen: bool | Sequence[Control]) -> tuple[Control, ...]:
    if isinstance(chosen, bool):
        return CONTROLS if chosen else ()
    unknown = [control for control in chosen if control not in CONTROLS]
    if unknown:
        raise RequestError(f"the control {unknown[0]!r} is not known; use {', '.join(CONTROLS)}.")
    return tuple(chosen)


@dataclass
class _Observer:
    """One starting point under attack, measured at every chosen step."""

    source: LocalModel
    kind: str
    prompts: PromptSet
    judges: Sequence[Judge]
    dispersion: Dispersion
    utility: ModelUtility | None
    cache: VerdictCache | None

    def identity(self) -> dict[str, Any]:
        """Of the starting point: its weights, how it is asked, where it is trained, and R, which depends on base and rank."""
        device = str(self.source.model.device.type)
        return {"model": self.kind, "device": device, "start": self.source.identity(), "r_align": asdict(self.r_align)}

    @cached_property
    def r_align(self) -> Ratio:
        """R of the starting point; to be asked for before it is trained."""
        return self.dispersion.ratio(self.source.model)

    def attacked(self, attack: Conversations, examples: Sequence[dict[str, list[int]]], settings: AttackSettings, seed: int) -> Curve:
        points: list[Point] = []
        before = self.r_align
        model, tokenizer, rendering = self.source.model, self.source.tokenizer, self.source.rendering
        batches = fine_tune(
            model,
            tokenizer,
            attack,
            settings,
            lambda step, now: points.append(self._point(step, now)),
            seed=seed,
            rendering=rendering,
            examples=examples,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return Curve(attack.name, self.kind, seed, before, tuple(points), tuple(batches))

    def _point(self, step: int, model: Any) -> Point:
        self.source.model = model
        evaluation = replace(evaluate(self.source, self.prompts, self.judges, cache=self.cache), title=f"{self.kind}, {step} steps")
        if self.kind == ALIGNED and step == 0:
            check_decided(evaluation, "aligned before the attack")  # now, not after hours of training
        found = {} if self.utility is None else dict(self.utility(self.source))
        return Point(step, evaluation, self.dispersion.ratio(model), found)


def _check_request(attacks: Sequence[Conversations], prompts: PromptSet, seeds: Sequence[int]) -> None:
    names = [attack.name for attack in attacks]
    if not names or len(set(names)) < len(names):
        raise RequestError(f"attacks: {', '.join(names) or 'none'}. Give at least one data set, and files of different names.")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise RequestError("give at least one seed, each once, none of them negative.")
    if not len(prompts):
        raise RequestError(f"{prompts.source} holds no prompts, so there is no attack to measure. Name a file with at least one prompt.")


def _sources(plan: Plan, hardened: Checkpoint | None) -> dict[str, Any]:
    found = {"base": plan.base, "aligned": plan.aligned} | ({"hardened": hardened} if hardened is not None else {})
    return {"hardened": None} | {
        role: {"title": checkpoint.title, **checkpoint.source.identity(), **output_identity(checkpoint), **form_of(checkpoint)}
        for role, checkpoint in found.items()
    }
