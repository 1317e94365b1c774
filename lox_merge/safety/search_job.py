"""A rank search from beginning to end: pair and factors opened, the model loaded once, theta_r measured in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lox_merge.jobs.engine import Progress
from lox_merge.jobs.recipe import Recipe
from lox_merge.safety.asr import check_attack
from lox_merge.safety.cache import VerdictCache
from lox_merge.safety.factored import open_factored
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
    check_attack(prompts, [judge])
    with open_factored(
        base,
        aligned,
        highest,
        factors=factors,
        recipe=recipe,
        model=model,
        device=device,
        cache_dir=cache_dir,
        order_is_right=order_is_right,
        base_is_right=base_is_right,
        decomposing=decomposing,
    ) as opened:
        source = opened.source
        return search_rank(
            source,
            RankSwapper(source.model, opened.plan, opened.factors, rank=highest),
            spectra_of(opened.factors),
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
