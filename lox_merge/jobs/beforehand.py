"""What can be said against a job before it begins, beyond its plan: the same for the job itself and for a dry run of it."""

from __future__ import annotations

from typing import Any

import torch

from lox_merge.errors import RequestError
from lox_merge.jobs.executors.choose import PROCESSES, check_executor
from lox_merge.jobs.executors.sizing import Workers, check_workers
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.manifest import job_description
from lox_merge.jobs.output_folder import check_output
from lox_merge.jobs.plan import Plan, check_disk
from lox_merge.jobs.store import check_can_travel


def resolve_device(name: str, *, here: bool = True) -> torch.device:
    """'auto', 'cpu', 'cuda' or 'cuda:n' as a torch device. Raises RequestError where it is not there.

    here: whether this machine works; else 'cuda' is whatever GPU a cluster gives a worker.
    """
    if not here and name == "cuda":
        return torch.device("cuda")
    if not here and name.startswith("cuda:"):
        raise RequestError(f"--device {name} names a GPU of this machine, and a Ray cluster gives each worker one of its own: use --device cuda.")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise RequestError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise RequestError(f"device {name} is not there ({torch.cuda.device_count()} CUDA device(s) found); use --device cpu or auto.")
    return device


def check_model_job(plan: Plan, *, device: str, workers: Workers, executor: str, overwrite: bool) -> tuple[torch.device, dict[str, Any], Journal]:
    """What is refused before any weights are read. Returns the device, the job as the manifest describes it, and the journal of its output."""
    check_workers(workers, low_disk=plan.passing is not None)
    check_executor(executor, low_disk=plan.passing is not None, weights_on_hub=plan.store is not None)
    if plan.store:
        check_can_travel(plan)
    target = resolve_device(device, here=executor == PROCESSES)
    job = job_description(plan, target)
    journal = check_folder(plan, job, overwrite=overwrite)
    if not overwrite:
        journal.check_store(plan.store)
    if not journal.folder.exists() and (overwrite or journal.manifest() is None):  # else some of it is there already, or all
        check_disk(plan)
    return target, job, journal


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
