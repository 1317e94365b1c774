"""A pair, its factors and its aligned model, opened and compared, for measurements that change the model's rank in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lox_merge.checkpoint.adapter import AdaptedCheckpoint
from lox_merge.checkpoint.quantised.view import QuantisedCheckpoint
from lox_merge.errors import RequestError
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.engine import Progress
from lox_merge.jobs.factors import SELECTION, Factors
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.manifest import output_identity
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.quantised import form_of
from lox_merge.jobs.recipe import Recipe
from lox_merge.safety.adapted import load_adapted
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.loading import load_model


@dataclass(frozen=True)
class Factored:
    """What `open_factored` gives. plan: which tensors are decomposed, and the open checkpoints; source: answers with aligned's weights."""

    plan: Plan
    factors: Factors
    source: LocalModel

    def identity(self) -> dict[str, dict[str, Any]]:
        """What a result records of base and aligned: titles and where they came from, with no path of this machine."""
        pair = (self.plan.base, self.plan.aligned)
        return {one.role: {"title": one.title, **one.source.identity(), **output_identity(one), **form_of(one)} for one in pair}


@contextmanager
def open_factored(
    base: str | Path,
    aligned: str | Path,
    highest: int,
    *,
    factors: str | Path | None = None,
    recipe: Recipe | None = None,
    model: Mapping[str, Any] | None = None,
    device: str = "auto",
    cache_dir: Path | None = None,
    order_is_right: bool = False,
    base_is_right: bool = False,
    decomposing: Progress | None = None,
) -> Iterator[Factored]:
    """Opens the pair with factors up to rank `highest`, and loads the aligned model once.

    factors: what `lox-merge decompose` wrote for this pair; without them the deltas are decomposed now, in a temporary folder
    that is gone at the end. recipe: which matrices; with factors, None takes theirs. model: settings of LocalModel.load.
    Raises RequestError before the model is loaded wherever headers and hashes can tell.
    """
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
            yield Factored(plan, held, load_aligned(plan, aligned, model or {}, device=device, cache_dir=cache_dir))
        finally:
            if held is not None:
                held.close()  # before its folder goes: some file systems keep open files


def _plan(base: str | Path, aligned: str | Path, scratch: str, recipe: Recipe, **sources: Any) -> Plan:
    """Which tensors are decomposed. Nothing is ever written to the plan's output."""
    return plan_hardening(base, aligned, Path(scratch) / "out", recipe=recipe, form="memory", **sources)


def load_aligned(plan: Plan, aligned: str | Path, settings: Mapping[str, Any], **where: Any) -> LocalModel:
    """The aligned model of a plan, a whole one or an adapter on its base. settings: of LocalModel.load."""
    loading = {key: settings[key] for key in ("dtype", "device_map", "trust_remote_code") if key in settings}
    rest = {key: value for key, value in settings.items() if key not in loading}
    if isinstance(plan.aligned, AdaptedCheckpoint):
        return LocalModel.of(load_adapted(plan.aligned, **where, **loading), **rest)
    return LocalModel.of(load_model(aligned, decode=isinstance(plan.aligned, QuantisedCheckpoint), **where, **loading), **rest)


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
