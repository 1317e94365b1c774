"""The main job: base and aligned in, hardened checkpoint out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lox_merge.checkpoint.adapter import AdaptedCheckpoint, is_adapter, open_model
from lox_merge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lox_merge.checkpoint.files import find_source
from lox_merge.checkpoint.quantised.view import as_quantised
from lox_merge.errors import LoxMergeWarning, PlanError, SourceError
from lox_merge.jobs.engine import Progress
from lox_merge.jobs.execute import WANTED_GAIN, JobResult, Silent, carry_out, warn_about_gain
from lox_merge.jobs.executors.choose import PROCESSES, check_executor
from lox_merge.jobs.executors.sizing import Workers, check_workers
from lox_merge.jobs.factors import Factors, open_factors
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.lox_edit import LoxEdit
from lox_merge.jobs.output_folder import output_folder
from lox_merge.jobs.plan import Plan, confirmed, make_plan
from lox_merge.jobs.quantised import AskedForm, requantised_text
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.select import TensorPlan
from lox_merge.jobs.store import check_some_difference, no_difference
from lox_merge.jobs.summary import Summary
from lox_merge.jobs.triplets import FromFactors

__all__ = [
    "WANTED_GAIN",
    "HardenResult",
    "Silent",
    "check_some_delta",
    "execute",
    "harden",
    "open_checkpoints",
    "plan_hardening",
    "with_recipe",
]


@dataclass(frozen=True)
class HardenResult(JobResult):
    """A finished hardening."""

    @property
    def summary(self) -> Summary:
        return Summary(**self.manifest["summary"])

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return self.report("harden")


def open_checkpoints(sources: Mapping[str, str | Path], cache_dir: Path | None = None, *, base_is_right: bool = False) -> dict[str, Checkpoint]:
    """Checkpoints by role, headers read; each but the first may be a PEFT adapter over the one before. Raises PlanError with the
    problems of all of them. base_is_right: take an adapter although it names another base. Quantised ones are shown as float32."""
    opened: dict[str, Checkpoint] = {}
    problems: list[str] = []
    roles = list(sources)
    for position, (role, source) in enumerate(sources.items()):
        before = opened.get(roles[position - 1]) if position else None
        try:
            if position == 0:
                opened[role] = as_quantised(open_checkpoint(source, role, cache_dir))
            elif before is None:
                if not is_adapter(found := find_source(source, role, cache_dir)):
                    open_checkpoint(found, role).close()  # for what is wrong with it, too
            elif isinstance(before, AdaptedCheckpoint) and is_adapter(find_source(source, role, cache_dir)):
                problems.append(f"{role} ({source}) and {before.role} ({before.title}) are both adapters. Merge {before.role} with peft first.")
            else:
                opened[role] = as_quantised(open_model(source, role, before, cache_dir, base_is_right=base_is_right))
        except PlanError as error:
            problems += error.problems
        except SourceError as error:
            problems.append(str(error))
    if problems:
        raise PlanError(problems)
    return opened


def plan_hardening(
    base: str | Path,
    aligned: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    factors: Factors | None = None,
    order_is_right: bool = False,
    base_is_right: bool = False,
    cache_dir: Path | None = None,
    low_disk: bool = False,
    form: AskedForm = "model",
) -> Plan:
    """Preflight alone: opens both checkpoints (headers only) and checks the whole job. Raises PlanError or SourceError.

    form: what will be written, which quantised checkpoints have to be fit for.
    base_is_right: take an adapter although it names another base. factors: of this pair, to spend no SVD (stays open as long as the plan
    is used); the weight files of local folders are read to see that they are of this pair. low_disk: as in `harden`. Raises RequestError
    where they are not, or hold too few triplets, or low_disk has nothing to do.
    """
    chosen = recipe or Recipe()
    opened = open_checkpoints({"base": base, "aligned": aligned}, cache_dir, base_is_right=base_is_right)
    plan = make_plan(opened, output_folder(out), chosen, LoxEdit(chosen), order_confirmed=order_is_right, form=form)
    plan.confirmed = confirmed(opened.values(), order=order_is_right)
    if factors is not None:
        held = FromFactors(factors)
        held.check(plan.edited)
        factors.check(plan.base, plan.aligned)
        plan.triplets = held
    if low_disk:
        plan.let_sources_pass()
    return plan


def with_recipe(plan: Plan, recipe: Recipe) -> Plan:
    """The plan of a hardening with the ranks and alphas of another recipe; what selects tensors has to be equal."""

    def changed(tensor: TensorPlan) -> TensorPlan:
        if tensor.action != "edit":
            return tensor
        return replace(tensor, rank=recipe.rank_for(tensor.name), alpha=recipe.alpha_for(tensor.name))

    shards = [replace(shard, tensors=tuple(map(changed, shard.tensors))) for shard in plan.shards]
    return replace(plan, recipe=recipe, edit=LoxEdit(recipe), shards=shards)


def harden(
    base: str | Path,
    aligned: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    factors: str | Path | None = None,
    device: str = "auto",
    workers: Workers = 1,
    executor: str = PROCESSES,
    overwrite: bool = False,
    order_is_right: bool = False,
    base_is_right: bool = False,
    cache_dir: Path | None = None,
    low_disk: bool = False,
    progress: Progress | None = None,
) -> HardenResult:
    """Writes W_align + alpha · Proj_k(W_align − W_base) to the folder `out` (LoX, arXiv 2506.15606).

    base, aligned: folders or Hub ids `org/name[@revision]`; aligned may be a PEFT LoRA adapter over base, whose delta is then taken
    exactly from its factors (the output has base's layout). The output has aligned's shard files, names, order, dtypes and
    side files. factors: file of `decompose` for this pair; no SVD is spent then. Called again after an interruption it goes on
    with the shards that are finished; finished output of the same job is checked and returned. low_disk: weight files on the Hub are
    downloaded shard by shard into `out` and dropped after use, except for those that the cache holds; RequestError where no source is
    on the Hub. workers: so many write shards at a time, as far as memory holds them ('auto': as the machine allows), and executor says
    where: 'processes' of this machine, 'ray' or 'ray://host:port' for a cluster with shared storage. The bytes are the same. (Machines that share
    none: the command's --weights-on-hub.)
    Raises RequestError (exit 2) before anything is written, LoxMergeError afterwards.
    """
    sources: dict[str, Any] = {"order_is_right": order_is_right, "base_is_right": base_is_right, "cache_dir": cache_dir}
    check_workers(workers, low_disk=low_disk)
    check_executor(executor, low_disk=low_disk)
    with open_factors(factors) as held:
        plan = plan_hardening(base, aligned, out, recipe=recipe, factors=held, low_disk=low_disk, form="model", **sources)
        return execute(plan, device=device, workers=workers, executor=executor, overwrite=overwrite, progress=progress)


def execute(
    plan: Plan,
    *,
    device: str = "auto",
    workers: Workers = 1,
    executor: str = PROCESSES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> HardenResult:
    """Carries out a plan; see `harden`."""
    settings: dict[str, Any] = {"device": device, "workers": workers, "executor": executor, "overwrite": overwrite, "progress": progress}
    result = HardenResult(**vars(carry_out(plan, check=lambda plan, _: check_some_delta(plan), **settings)))
    if plan.store and result.summary.zero_deltas == len(plan.edited):
        journal = Journal(plan.out)
        with journal.locked():
            journal.abandon(plan.files)
        raise no_difference(plan)
    if result.bytes_written:
        summary = result.summary
        remedy = ", or --as-adapter, which ships the update beside the aligned weights"
        if (text := requantised_text(result.manifest, WANTED_GAIN)) is not None:
            warnings.warn(text, LoxMergeWarning, stacklevel=2)
        else:
            warn_about_gain(summary.realised_gain, summary.smallest_gain, summary.smallest_gain_tensor, remedy)
    return result


def check_some_delta(plan: Plan) -> None:
    """Raises RequestError when every delta is zero. Reads smallest tensors first and stops at the first difference.

    Where sources pass through the disk, shard after shard, and at the first one that differs. Where they are never on this machine, by
    the hashes that the Hub states: two sets of equal files are found so, and any others when their shards are made.
    """
    if plan.store:
        check_some_difference(plan)
        return
    passing = plan.passing
    if passing is None and _any_delta(plan, plan.edited):
        return
    for position, shard in enumerate(plan.shards if passing else ()):
        if _any_delta(plan, [tensor for tensor in shard.tensors if tensor.action == "edit"]):
            return
        if passing:
            passing.drop(passing.needed[position])
    raise no_difference(plan)


def _any_delta(plan: Plan, tensors: list[TensorPlan]) -> bool:
    for tensor in sorted(tensors, key=lambda tensor: tensor.info.size):
        base, aligned = plan.base.tensor(tensor.base_name), plan.aligned.tensor(tensor.name)
        wide = torch.promote_types(base.dtype, aligned.dtype)
        if not torch.equal(base.to(wide), aligned.to(wide)):
            return True
    return False
