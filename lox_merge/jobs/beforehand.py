"""What can be said against a job before it begins, beyond its plan: the same for the job itself and for a dry run of it."""

from __future__ import annotations

from typing import Any

import torch

from lox_merge.jobs.execute import resolve_device
from lox_merge.jobs.executors.choose import PROCESSES, check_executor
from lox_merge.jobs.executors.sizing import Workers, check_workers
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.manifest import job_description
from lox_merge.jobs.plan import Plan, check_disk, check_output
from lox_merge.jobs.store import check_can_travel


def check_model_job(plan: Plan, *, device: str, workers: Workers, executor: str, overwrite: bool) -> torch.device:
    """What `carry_out` refuses before it reads weights. Returns the device."""
    check_workers(workers, low_disk=plan.passing is not None)
    check_executor(executor, low_disk=plan.passing is not None, weights_on_hub=plan.store is not None)
    if plan.store:
        check_can_travel(plan)
    target = resolve_device(device, here=executor == PROCESSES)
    journal = check_folder(plan, job_description(plan, target), overwrite=overwrite)
    if not overwrite:
        journal.check_store(plan.store)
    check_disk(plan)
    return target


def check_folder(plan: Plan, job: dict[str, Any], *, overwrite: bool) -> Journal:
    """Raises OutputError where the output is not this program's, or is another job's that is to stay."""
    journal = Journal(plan.out)
    check_output(plan.out, overwrite=overwrite)
    if not overwrite:
        journal.check(job)
    return journal


def all_here(plan: Plan) -> bool:
    """Whether all weights are in folders of this machine: a dry run downloads none to look at them."""
    return all(checkpoint.source.identity()["kind"] == "folder" for checkpoint in plan.checkpoints.values())
