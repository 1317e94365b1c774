"""The projection filter as a job: base, aligned and fine-tuned checkpoint in, filtered checkpoint out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lox_merge.errors import RecipeError, SourceChangedError
from lox_merge.jobs.atomic import json_bytes, write_atomically
from lox_merge.jobs.beforehand import resolve_device
from lox_merge.jobs.engine import Progress
from lox_merge.jobs.execute import JobResult, carry_out, warn_about_gain
from lox_merge.jobs.executors.choose import PROCESSES
from lox_merge.jobs.executors.sizing import Workers
from lox_merge.jobs.factors import Factors, open_factors
from lox_merge.jobs.filter_checks import check_direction, find_least_similar
from lox_merge.jobs.filter_edit import FilterEdit, check_factors
from lox_merge.jobs.filter_recipe import FilterRecipe
from lox_merge.jobs.filter_record import FilterSummary
from lox_merge.jobs.harden import open_checkpoints
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.output_folder import output_folder
from lox_merge.jobs.plan import Plan, confirmed, make_plan
from lox_merge.jobs.triplets import FromFactors

# Working files: layers that were selected, and sources whose direction was found right.
_LAYERS, _CHECKED = "layers.json", "checked.json"


@dataclass(frozen=True)
class ProjectResult(JobResult):
    """A finished projection."""

    @property
    def summary(self) -> FilterSummary:
        return FilterSummary(**self.manifest["summary"])

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return self.report("project")


def plan_projection(
    base: str | Path,
    aligned: str | Path,
    finetuned: str | Path,
    out: str | Path,
    *,
    recipe: FilterRecipe,
    factors: Factors | None = None,
    order_is_right: bool = False,
    base_is_right: bool = False,
    cache_dir: Path | None = None,
) -> Plan:
    """Preflight from headers alone; with `factors` of base and aligned their weight files are read. Raises PlanError or RequestError."""
    if factors is not None and (recipe.basis != "top" or recipe.projector != "subspace"):
        raise RecipeError("factors hold the leading directions of each delta: they go with basis 'top' and projector 'subspace'.")
    opened = open_checkpoints({"base": base, "aligned": aligned, "finetuned": finetuned}, cache_dir, base_is_right=base_is_right)
    plan = make_plan(opened, output_folder(out), recipe, FilterEdit(recipe), order_confirmed=order_is_right)
    plan.confirmed = confirmed(opened.values(), order=order_is_right)
    if factors is not None:
        held = FromFactors(factors)
        check_factors(held, plan.edited)
        factors.check(plan.base, plan.aligned)
        plan.triplets = held
    return plan


def project(
    base: str | Path,
    aligned: str | Path,
    finetuned: str | Path,
    out: str | Path,
    *,
    recipe: FilterRecipe,
    factors: str | Path | None = None,
    device: str = "auto",
    workers: Workers = 1,
    executor: str = PROCESSES,
    overwrite: bool = False,
    order_is_right: bool = False,
    base_is_right: bool = False,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> ProjectResult:
    """Writes `finetuned` with its update kept to (parallel) or out of (orthogonal) the alignment subspace to the folder `out`.

    "Safety subspaces are not distinct" (Ponkshe et al. 2025), Eqs. 5 and 6, with Safe LoRA and SafeMERGE as settings of the recipe.
    base, aligned, finetuned: folders or Hub ids `org/name[@revision]`; finetuned may be a PEFT LoRA adapter over aligned (the output is
    the whole model, in aligned's layout). The output has finetuned's shard files, names, order, dtypes and side files. factors: file of
    `decompose` for base and aligned. workers, executor: as in `harden`. Resumes and refuses as `harden` does; a `finetuned` that
    points back along the alignment delta is refused. Raises RequestError (exit 2) before anything is written, LoxMergeError afterwards.
    """
    sources: dict[str, Any] = {"order_is_right": order_is_right, "base_is_right": base_is_right, "cache_dir": cache_dir}
    with open_factors(factors) as held:
        plan = plan_projection(base, aligned, finetuned, out, recipe=recipe, factors=held, **sources)
        return execute_projection(plan, device=device, workers=workers, executor=executor, overwrite=overwrite, progress=progress)


def execute_projection(
    plan: Plan,
    *,
    device: str = "auto",
    workers: Workers = 1,
    executor: str = PROCESSES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ProjectResult:
    """Carries out a plan; see `project`."""
    target = resolve_device(device)

    def prepare(plan: Plan, journal: Journal) -> None:
        # Seen to be right before the first byte of this very job was written: not read again to go on, unless a file was replaced since.
        if overwrite or not journal.begun or (journal.read(_CHECKED) or {}).get("sources") != _seen(plan):
            check_direction(plan)

    def begin(plan: Plan, journal: Journal) -> None:
        write_atomically(journal.folder / _CHECKED, json_bytes({"sources": _seen(plan)}), journal.folder)
        settle_layers(plan, journal, target)

    done = carry_out(plan, device=device, workers=workers, executor=executor, overwrite=overwrite, progress=progress, check=prepare, begin=begin)
    result = ProjectResult(**vars(done))
    if result.bytes_written:
        summary = result.summary
        warn_about_gain(summary.realised_gain, summary.smallest_gain, summary.smallest_gain_tensor, "")
    return result


def settle_layers(plan: Plan, journal: Journal, device: torch.device) -> None:
    """Finds the layers that `recipe.layers` selects, once for a job: an interrupted one goes on with what it found.

    Raises SourceChangedError where sources were replaced since, and other layers are selected now.
    """
    edit = plan.edit
    assert isinstance(edit, FilterEdit)
    if edit.recipe.layers is None:
        return
    known, seen = journal.read(_LAYERS) or {}, _seen(plan)
    found = known.get("least_similar")
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        found = None
    if found is None or known.get("sources") != seen:
        again = sorted(find_least_similar(plan, edit, device))
        if found is not None and again != found:
            raise SourceChangedError(
                f"the layers that are least similar are not those that {plan.out} was begun with: a source was changed meanwhile. "
                "Restore it, or pass --overwrite to start anew."
            )
        found = again
        write_atomically(journal.folder / _LAYERS, json_bytes({"least_similar": found, "sources": seen}), journal.folder)
    plan.edit = replace(edit, least_similar=frozenset(found))


def _seen(plan: Plan) -> dict[str, dict[str, list[int] | None]]:
    """What the weight files of every source looked like when their headers were read, as JSON has it; null for those of a commit on the Hub."""
    seen: dict[str, dict[str, list[int] | None]] = {}
    for role, file in dict.fromkeys(source for shard in plan.shards for source in shard.sources(plan.checkpoints)):
        stamp = plan.checkpoints[role].source.seen(file)
        seen.setdefault(role, {})[file] = None if stamp is None else list(stamp)
    return seen
