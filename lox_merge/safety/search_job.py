"""A rank search from beginning to end: pair and factors opened and compared, the model loaded once, theta_r measured in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lox_merge.checkpoint.adapter import AdaptedCheckpoint
from lox_merge.errors import RequestError
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.engine import Progress
from lox_merge.jobs.factors import SELECTION, Factors
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.recipe import Recipe
from lox_merge.safety.adapted import load_adapted
from lox_merge.safety.asr import check_judges
from lox_merge.safety.cache import VerdictCache
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.rank_model import RankSwapper
from lox_merge.safety.search import DEFAULT_RANKS, DEFAULT_RHO, RankPoint, RankSearch, check_request, search_rank
from lox_merge.safety.spectrum import spectra_of
from lox_merge.safety.types import Judge, PromptSet

ModelUtility = Callable[[LocalModel], Mapping[str, float | None]]


def search(
    base: str | Path,
    aligned: str | Path,
    prompts: PromptSet,
    judge: Judge,
    *,
    ranks: Sequence[int] = DEFAULT_RANKS,
    rho: float = DEFAULT_RHO,
    bisect: bool = False,
    confident: bool = False,
    factors: str | Path | None = None,
    recipe: Recipe | None = None,
    model: Mapping[str, Any] | None = None,
    utility: ModelUtility | None = None,
    cache: VerdictCache | None = None,
    replies: Path | None = None,
    device: str = "auto",
    cache_dir: Path | None = None,
    order_is_right: bool = False,
    base_is_right: bool = False,
    decomposing: Progress | None = None,
    progress: Callable[[RankPoint], None] | None = None,
) -> RankSearch:
    """The effective rank of a pair; see `search_rank` for the criterion. aligned may be a PEFT adapter over base (base_is_right: although
    it names another one).

    factors: what `lox-merge decompose` wrote for this pair; without them the deltas are decomposed now, in a temporary
    folder. recipe: which matrices (its rank and alpha do not matter); with factors, None takes theirs. model: settings of
    LocalModel.load (dtype, decoding, rendering, batch_size, …). utility: measured beside each ASR. replies: a folder that keeps
    them, from which the same search goes on after an interruption.
    Raises RequestError before any model is loaded wherever headers and hashes can tell.
    """
    highest = max(1, *check_request(ranks, rho))
    check_judges([judge])
    if not len(prompts):
        raise RequestError(f"{prompts.source} holds no prompts, so there is no attack to measure. Name a file with at least one prompt.")
    sources: dict[str, Any] = {"order_is_right": order_is_right, "base_is_right": base_is_right, "cache_dir": cache_dir}
    with tempfile.TemporaryDirectory(prefix="lox-merge-") as scratch:
        held = None
        try:
            if factors is not None:
                held = Factors.open(factors)
                held.require(highest)
                chosen = _chosen(recipe, held)
                plan = _plan(base, aligned, scratch, chosen, **sources)
                held.check(plan.base, plan.aligned)
                plan.fetch()
            else:
                chosen = replace(recipe or Recipe(), rank=highest, alpha=1.0, rank_pattern=(), alpha_pattern=())
                plan = _plan(base, aligned, scratch, chosen, **sources)
                file = Path(scratch) / "factors.safetensors"
                held = decompose(
                    base,
                    aligned,
                    file,
                    recipe=chosen,
                    device=device,
                    progress=decomposing,
                    **sources,
                ).factors
            source = _load(plan, aligned, model or {}, device=device, cache_dir=cache_dir)
            return search_rank(
                source,
                RankSwapper(source.model, plan, held, rank=highest),
                spectra_of(held),
                prompts,
                judge,
                ranks=ranks,
                rho=rho,
                bisect=bisect,
                confident=confident,
                utility=None if utility is None else lambda: utility(source),
                cache=cache,
                replies=replies,
                progress=progress,
            )
        finally:
            if held is not None:
                held.close()  # before its folder goes: some file systems keep open files


def _plan(base: str | Path, aligned: str | Path, scratch: str, recipe: Recipe, **sources: Any) -> Plan:
    """Which tensors are decomposed. Nothing is ever written to the plan's output."""
    return plan_hardening(base, aligned, Path(scratch) / "out", recipe=recipe, **sources)


def _load(plan: Plan, aligned: str | Path, settings: Mapping[str, Any], **where: Any) -> LocalModel:
    """The aligned model, a whole one or an adapter on its base."""
    if not isinstance(plan.aligned, AdaptedCheckpoint):
        return LocalModel.load(aligned, **where, **settings)
    loading = {key: settings[key] for key in ("dtype", "device_map", "trust_remote_code") if key in settings}
    rest = {key: value for key, value in settings.items() if key not in loading}
    return LocalModel.of(load_adapted(plan.aligned, **where, **loading), **rest)


def _chosen(recipe: Recipe | None, factors: Factors) -> Recipe:
    """The recipe of the factors, unless another selection was asked for. Raises RequestError then."""
    held = factors.recipe
    if recipe is None:
        return held
    asked, there = recipe.to_json(), held.to_json()
    different = [f"{key} is {asked[key]}, was {there[key]}" for key in SELECTION if asked[key] != there[key]]
    if different:
        raise RequestError(
            f"{factors.path.name} was made with another selection of matrices ({'; '.join(different)}). "
            "Give the same selection, or decompose again with this one."
        )
    return held
