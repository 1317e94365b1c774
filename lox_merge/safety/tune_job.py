"""A tuning from beginning to end: pair decomposed once, aligned measured, trials run, the study kept."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lox_merge.errors import RequestError
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.engine import Progress
from lox_merge.jobs.factors import Factors
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.recipe import Recipe
from lox_merge.safety.asr import check_judges
from lox_merge.safety.attack import AttackSettings, check_attack_packages
from lox_merge.safety.cache import VerdictCache
from lox_merge.safety.chat import Rendering
from lox_merge.safety.conversations import Conversations, tokenised
from lox_merge.safety.decoding import Decoding
from lox_merge.safety.divergence import reference_log_probabilities
from lox_merge.safety.factored import load_aligned
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.seeds import check_seed
from lox_merge.safety.tune_study import check_tune_packages, held_study, open_study
from lox_merge.safety.tuner import Tuner, run_trials
from lox_merge.safety.tuning import TuneSpace, Tuning
from lox_merge.safety.types import Judge, PromptSet

# Each prompt keeps 4 bytes × positions × vocabulary of the aligned model; the place where a reply begins is what matters most.
LAST_POSITIONS = 8


def tune(
    base: str | Path,
    aligned: str | Path,
    prompts: PromptSet,
    judge: Judge,
    harmless: PromptSet,
    attack: Conversations,
    *,
    space: TuneSpace | None = None,
    trials: int = 20,
    settings: AttackSettings | None = None,
    study: Path | None = None,
    seed: int = 0,
    factors: str | Path | None = None,
    recipe: Recipe | None = None,
    model: Mapping[str, Any] | None = None,
    rendering: Rendering | None = None,
    cache: VerdictCache | None = None,
    device: str = "auto",
    cache_dir: Path | None = None,
    order_is_right: bool = False,
    base_is_right: bool = False,
    decomposing: Progress | None = None,
    report: Callable[[str], None] | None = None,
) -> Tuning:
    """Optimises (rank, alpha) over ASR after `attack` and KL from aligned on `harmless`; see `Tuning`.

    settings: the attack; measured after its last step. study: a file that keeps the trials; the same request goes on from it, up
    to `trials` finished ones in all, in one process at a time: another one is refused. recipe: which matrices (its rank and alpha do not
    matter). factors: of this pair; without them the deltas are decomposed now, once. Nothing is written beside the study. Raises
    RequestError before any model is loaded wherever headers, data and packages can tell. Where no figure can be had from aligned:
    LoxMergeError.
    """
    seed = check_seed(seed)
    space, settings, rendering = space or TuneSpace(), settings or AttackSettings(steps=(50,)), rendering or Rendering()
    check_tune_packages()
    check_attack_packages(settings.lora)
    check_judges([judge])
    for role, given in (("prompts", prompts), ("harmless prompts", harmless)):
        if not len(given):
            raise RequestError(f"{given.source} holds no {role}. Name a file with at least one.")
    if trials < 1:
        raise RequestError(f"{trials} trials measure nothing; ask for 1 or more.")
    settings = replace(settings, steps=(max(settings.steps),))
    with ExitStack() as stack:
        stack.enter_context(held_study(study))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lox-merge-")))
        chosen = replace(recipe or Recipe(), rank=space.ranks[1], alpha=1.0, rank_pattern=(), alpha_pattern=())
        shared: dict[str, Any] = {"order_is_right": order_is_right, "base_is_right": base_is_right, "cache_dir": cache_dir}
        if factors is None:
            factors = decompose(base, aligned, scratch / "factors.safetensors", recipe=chosen, device=device, progress=decomposing, **shared).path
        held = stack.enter_context(Factors.open(factors))
        plan = plan_hardening(base, aligned, scratch / "out", recipe=chosen, factors=held, form="memory", **shared)
        _check_groups(space, plan)
        asked = {
            "sources": held.document["sources"],
            "recipe": chosen.to_json(),
            "space": asdict(space),
            "attack": attack.identity(),
            "training": settings.to_json(),
            "prompts": {"source": prompts.source, "sha256": prompts.sha256, "n": len(prompts)},
            "harmless": {"source": harmless.source, "sha256": harmless.sha256, "n": len(harmless)},
            "judge": judge.identity(),
            "rendering": asdict(rendering),
            "decoding": ((model or {}).get("decoding") or Decoding()).identity(),
            "seed": seed,
        }
        opened = open_study(study, json.loads(json.dumps(asked)), seed)
        plan.fetch()

        def load() -> LocalModel:
            return load_aligned(plan, aligned, {"dtype": "float32", "rendering": rendering, **(model or {})}, device=device, cache_dir=cache_dir)

        first = load()
        examples = tokenised(attack, first.tokenizer, rendering, settings.max_length)
        reference = reference_log_probabilities(first.model, first.tokenizer, harmless, rendering, last=LAST_POSITIONS)
        del first
        tuner = Tuner(load, plan, prompts, judge, reference, attack, examples, settings, seed=seed, cache=cache)
        return run_trials(opened, space, tuner, chosen, trials, report=report)


def _check_groups(space: TuneSpace, plan: Plan) -> None:
    for group in space.groups:
        if not any(re.search(group, tensor.name) for tensor in plan.edited):
            raise RequestError(f"--group {group!r} matches no tensor that is edited; a name looks like {plan.edited[0].name!r}.")
