"""The brittleness probe of a toy pair, as one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lox_merge.lab.checkpoints import toy_pair
from lox_merge.lab.measure import BATCH_SIZE, DECODING, NotRefused, ToyUtility, forbidden_prompts
from lox_merge.lab.models import one_thread
from lox_merge.lab.recipe import ToyRecipe
from lox_merge.lab.requests import draw_requests
from lox_merge.safety.brittleness import DEFAULT_RANKS, Brittleness
from lox_merge.safety.brittleness_job import brittleness
from lox_merge.safety.rank_edits import RANDOM_KINDS, RandomKind
from lox_merge.safety.types import Judge


def toy_brittleness(
    seed: int = 0,
    *,
    cache_dir: Path | None = None,
    ranks: Sequence[int] = DEFAULT_RANKS,
    controls: Sequence[RandomKind] = RANDOM_KINDS,
    judge: Judge | None = None,
    report: Callable[[str], None] = lambda _message: None,
    **settings: Any,
) -> Brittleness:
    """Trains the pair of `seed` (or takes it from the cache) and probes it with the laboratory's prompts, judge and utility.

    judge: 'not refused' unless another is given. settings: those of `lox_merge.brittleness`, such as draws.
    """
    recipe = ToyRecipe(seed=seed)
    with one_thread():  # sums in a fixed order: the same seed gives the same figures
        pair, tests = toy_pair(recipe, cache_dir, report), draw_requests(recipe).tests
        return brittleness(
            pair.base,
            pair.aligned,
            forbidden_prompts(tests),
            judge or NotRefused(),
            ranks=ranks,
            controls=controls,
            model={"decoding": DECODING, "batch_size": BATCH_SIZE},
            utility=ToyUtility(tests),
            device="cpu",
            **settings,
        )
