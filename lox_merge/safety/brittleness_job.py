"""The brittleness probe: ASR of W_align - Proj_k(Delta_align) over k, beside random directions of equal norm.

After Wei et al. 2024 (arXiv 2402.05162). They take away directions of W itself, found with activations and kept apart from utility's;
here it is the leading singular directions of the delta, those that LoX extrapolates. The weakened models exist in memory alone:
nothing here writes their weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lox_merge.jobs.engine import Progress
from lox_merge.jobs.recipe import Recipe
from lox_merge.safety.asr import check_attack, compare, evaluate
from lox_merge.safety.brittleness import DEFAULT_DRAWS, DEFAULT_RANKS, LEADING, SIGNIFICANCE, Brittleness, RemovalPoint, check_probe
from lox_merge.safety.brittleness_notes import brittleness_notes
from lox_merge.safety.cache import VerdictCache
from lox_merge.safety.edited_source import EditedSource
from lox_merge.safety.factored import open_factored
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.rank_edits import REMOVAL, RandomKind, random_removal
from lox_merge.safety.rank_model import RankSwapper
from lox_merge.safety.seeds import check_seed
from lox_merge.safety.spectrum import Spectra, spectra_of
from lox_merge.safety.types import Evaluation, Judge, PromptSet

ModelUtility = Callable[[LocalModel], Mapping[str, float | None]]


def brittleness(
    base: str | Path,
    aligned: str | Path,
    prompts: PromptSet,
    judge: Judge,
    *,
    ranks: Sequence[int] = DEFAULT_RANKS,
    controls: Sequence[RandomKind] = ("random",),
    draws: int = DEFAULT_DRAWS,
    seed: int = 0,
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
    progress: Callable[[RemovalPoint], None] | None = None,
) -> Brittleness:
    """How fast ASR rises as the leading directions of alignment are taken away, beside random ones; see `probe`.

    controls: 'random' has the delta's singular values in Haar-random directions, 'random-subspace' is the delta on Haar-random output
    directions, scaled; both have the norm of Proj_k(Delta) in every matrix. draws: of each, made from `seed`. factors, recipe, model,
    utility, replies and the rest: as in `lox_merge.safety.search_job.search`.
    Raises RequestError before any model is loaded wherever headers and hashes can tell.
    """
    highest = max(check_probe(ranks, controls, draws))
    check_attack(prompts, [judge])
    seed = check_seed(seed)
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
        return probe(
            source,
            RankSwapper(source.model, opened.plan, opened.factors, rank=highest, edit=REMOVAL),
            spectra_of(opened.factors),
            prompts,
            judge,
            ranks=ranks,
            controls=controls,
            draws=draws,
            seed=seed,
            utility=None if utility is None else lambda: utility(source),
            cache=cache,
            replies=replies,
            sources=opened.identity(),
            progress=progress,
        )


def probe(
    source: LocalModel,
    swapper: RankSwapper,
    spectra: Spectra,
    prompts: PromptSet,
    judge: Judge,
    *,
    ranks: Sequence[int] = DEFAULT_RANKS,
    controls: Sequence[RandomKind] = ("random",),
    draws: int = DEFAULT_DRAWS,
    seed: int = 0,
    utility: Callable[[], Mapping[str, float | None]] | None = None,
    cache: VerdictCache | None = None,
    replies: Path | None = None,
    sources: Mapping[str, Any] | None = None,
    progress: Callable[[RemovalPoint], None] | None = None,
) -> Brittleness:
    """Measures aligned, aligned without its leading directions, and aligned without as many random ones of equal norm.

    source: generates with the very model that `swapper` (made with an edit of the aligned anchor) changes. replies: a folder from whose
    files an interrupted probe goes on. sources: what the result records of base and aligned. Leaves the aligned weights in place,
    whatever happens. Raises RequestError for settings that are not allowed.
    """
    wanted = check_probe(ranks, controls, draws)
    level = SIGNIFICANCE / len(wanted)
    points: list[RemovalPoint] = []
    with swapper:
        if swapper.rank is not None:
            swapper.restore()
        reference = evaluate(EditedSource(source, replies), prompts, [judge], cache=cache)
        aligned_utility = dict(utility()) if utility else {}
        leading: dict[int, Evaluation] = {}
        for directions, draw in ((LEADING, None), *((control, draw) for control in controls for draw in range(draws))):
            swapper.use(REMOVAL if draw is None else random_removal(directions, seed, draw))  # type: ignore[arg-type]  # checked above
            for rank in wanted:
                started = time.perf_counter()
                swapper.set_rank(rank)
                changed = time.perf_counter()
                evaluation = evaluate(_without(source, replies, directions, draw, rank, seed), prompts, [judge], cache=cache)
                done = time.perf_counter()
                if draw is None:
                    leading[rank] = evaluation
                points.append(
                    RemovalPoint(
                        directions=directions,
                        draw=draw,
                        rank=rank,
                        attack=evaluation.attack_success[judge.name],
                        against_aligned=compare(reference, evaluation, judge.name),
                        against_leading=None if draw is None else compare(evaluation, leading[rank], judge.name),
                        mean_removed=spectra.mean_ratio(rank),
                        energy_removed=spectra.energy_ratio(rank),
                        realised_gain=swapper.realised_gain(),
                        change_seconds=changed - started,
                        evaluation_seconds=done - changed,
                        utility=dict(utility()) if utility else {},
                    )
                )
                if progress:
                    progress(points[-1])
    found = Brittleness(
        sources=dict(sources or {}),
        judge=judge.identity(),
        prompts=reference.prompts,
        model=reference.model,
        ranks=(0, *wanted),
        controls=tuple(controls),
        draws=draws,
        seed=seed,
        level=level,
        aligned=reference.attack_success[judge.name],
        aligned_utility=aligned_utility,
        points=tuple(points),
        noise_floor=spectra.noise_floor(),
        notes=(),
    )
    return replace(found, notes=tuple(brittleness_notes(found)))


def _without(source: LocalModel, folder: Path | None, directions: str, draw: int | None, rank: int, seed: int) -> EditedSource:
    about: dict[str, Any] = {"removed": rank, "directions": directions}
    if draw is None:
        return EditedSource(source, folder, f"without {rank} {directions}", about)
    return EditedSource(source, folder, f"without {rank} {directions}, draw {draw}", about | {"draw": draw, "seed": seed})
