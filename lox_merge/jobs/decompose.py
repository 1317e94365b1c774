"""Leading singular triplets of every delta of a pair, once, as one file: what search and inspect then reuse."""

from __future__ import annotations

import shutil
import time
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lox_merge.checkpoint.safetensors_format import read_header
from lox_merge.errors import CheckpointFormatError, Interrupted, LoxMergeWarning, OutputError, RequestError
from lox_merge.home_paths import expanded
from lox_merge.jobs.atomic import sync_folder
from lox_merge.jobs.beforehand import all_here, resolve_device
from lox_merge.jobs.engine import Progress
from lox_merge.jobs.execute import abandoned_where_not_finite
from lox_merge.jobs.factors import FORMAT, SELECTION, Factors, read_document
from lox_merge.jobs.harden import Silent, check_some_delta, plan_hardening
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.manifest import job_description
from lox_merge.jobs.output_folder import check_room, check_work_folder
from lox_merge.jobs.pieces import assemble, piece_name, write_pieces
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.recorded import factors_damage
from lox_merge.maths.rank import parse_rank

DEFAULT_FACTORS_RANK = 64


@dataclass(frozen=True)
class DecomposeResult:
    """A finished file of factors. seconds: wall time of this call; computed: False where the file was there already."""

    path: Path
    factors: Factors
    seconds: float
    computed: bool

    def to_json(self) -> dict[str, Any]:
        """For --json: sources, settings and one record per matrix."""
        document = self.factors.document
        return {"command": "decompose", "output": self.path.name, "seconds": self.seconds, "computed": self.computed, **document}


def plan_decomposition(
    base: str | Path,
    aligned: str | Path,
    factors: str | Path,
    *,
    recipe: Recipe | None = None,
    order_is_right: bool = False,
    base_is_right: bool = False,
    cache_dir: Path | None = None,
) -> Plan:
    """Preflight from headers alone. recipe: rank (a number) and which tensors. Raises RequestError or PlanError."""
    path = expanded(factors)
    chosen = recipe or Recipe(rank=DEFAULT_FACTORS_RANK)
    if path.suffix != ".safetensors":
        raise RequestError(f"the file of factors {path} does not end in .safetensors; call it {path.name}.safetensors or so.")
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Name a file for the factors, such as {path / 'factors.safetensors'}.")
    if parse_rank(str(chosen.rank)).kind != "fixed" or chosen.rank_pattern:
        raise RequestError(f"rank {chosen.rank} depends on the matrix; factors need one number, such as --rank {DEFAULT_FACTORS_RANK}.")
    sources: dict[str, Any] = {"order_is_right": order_is_right, "base_is_right": base_is_right, "cache_dir": cache_dir}
    # Factors leave the weights as they are stored, like an adapter: quantised ones will do.
    plan = plan_hardening(base, aligned, _work_folder(path), recipe=chosen, form="adapter", **sources)
    # What is not decomposed is not copied either; only a vocabulary that differs is news here.
    return replace(plan, warnings=[text.replace("is copied, not edited", "is not decomposed") for text in plan.warnings])


def decompose(
    base: str | Path,
    aligned: str | Path,
    factors: str | Path,
    *,
    recipe: Recipe | None = None,
    device: str = "auto",
    overwrite: bool = False,
    order_is_right: bool = False,
    base_is_right: bool = False,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> DecomposeResult:
    """Writes the leading triplets of W_align - W_base of every selected matrix to the file `factors` (*.safetensors).

    Called again after an interruption it goes on with the pieces that are finished (kept beside the file until it is
    whole) and ends in the same bytes. Raises RequestError before anything is written, LoxMergeError afterwards.
    """
    sources: dict[str, Any] = {"order_is_right": order_is_right, "base_is_right": base_is_right, "cache_dir": cache_dir}
    plan = plan_decomposition(base, aligned, factors, recipe=recipe, **sources)
    return execute_decomposition(plan, factors, device=device, overwrite=overwrite, progress=progress)


def execute_decomposition(
    plan: Plan, factors: str | Path, *, device: str = "auto", overwrite: bool = False, progress: Progress | None = None
) -> DecomposeResult:
    """Carries out a plan; see `decompose`."""
    started = time.perf_counter()
    path = expanded(factors)
    target = resolve_device(device)
    job = _job(plan, target)
    journal = Journal(plan.out)
    found = _check_file(plan, path, job, overwrite=overwrite)
    if found is not None:
        found.check(plan.base, plan.aligned)
        if plan.out.exists():  # stopped between the last rename and the clean-up
            with journal.locked():
                shutil.rmtree(plan.out, ignore_errors=True)
        return DecomposeResult(path, found, time.perf_counter() - started, computed=False)
    plan.fetch()
    check_some_delta(plan)
    for text in plan.warnings:
        warnings.warn(text, LoxMergeWarning, stacklevel=3)
    try:
        with journal.locked():
            if overwrite:
                journal.clear()
            journal.begin(job)
            with abandoned_where_not_finite(journal, [piece_name(shard) for shard in plan.shards]):
                records = write_pieces(plan, journal, target, progress or Silent())
            assemble(path, records, _build_document(plan, job, records), journal)
            shutil.rmtree(plan.out, ignore_errors=True)
            sync_folder(path.parent)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted. Finished pieces are kept in {plan.out}; run the same command again to go on, or pass --overwrite to start anew."
        ) from None
    return DecomposeResult(path, Factors.open(path), time.perf_counter() - started, computed=True)


def check_decomposition(plan: Plan, factors: str | Path, *, device: str = "auto", overwrite: bool = False) -> None:
    """What `execute_decomposition` refuses before it writes; weights are read where they are on this machine. Raises RequestError."""
    found = _check_file(plan, expanded(factors), _job(plan, resolve_device(device)), overwrite=overwrite)
    if all_here(plan):
        if found is not None:
            found.check(plan.base, plan.aligned)
        else:
            check_some_delta(plan)


def _job(plan: Plan, device: torch.device) -> dict[str, Any]:
    settings = plan.recipe.to_json()
    return job_description(plan, device) | {
        "method": "decompose",
        "recipe": {key: settings[key] for key in ("rank", "tolerance", "seed", *SELECTION)},
    }


def _check_file(plan: Plan, path: Path, job: dict[str, Any], *, overwrite: bool) -> Factors | None:
    """The factors of this very job where the file holds them. Raises OutputError where it, or its working folder, is another's."""
    check_work_folder(plan.out)
    if path.exists():
        there = _document(path)
        if there is None:
            raise OutputError(f"{path} exists and holds no factors of lox-merge; it is not replaced. Choose another name, or remove it yourself.")
        if not overwrite:
            if there["job"] != job:
                changed = ", ".join(key for key in job if there["job"].get(key) != job[key])
                raise OutputError(f"{path} holds the factors of another job ({changed} differ). Choose another name, or pass --overwrite.")
            return Factors.open(path)
    if not overwrite:
        Journal(plan.out).check(job)
    check_room(plan.out, 2 * factors_bytes(plan))
    return None


def factors_bytes(plan: Plan) -> int:
    """Bytes of the vectors and values, at most: exact unless a delta has fewer directions than asked for."""
    total = 0
    for tensor in plan.edited:
        for view in tensor.views:
            assert tensor.rank is not None
            k = tensor.rank.from_shape(min(view.shape)) or 0
            total += k * (4 * sum(view.shape) + 8)
    return total


def selection_report(plan: Plan) -> dict[str, Any]:
    """Plain values for --dry-run: counts and bytes."""
    return {
        "command": "decompose --dry-run",
        "tensors": len(plan.edited),
        "matrices": sum(len(tensor.views) for tensor in plan.edited),
        "left_out": dict(Counter(tensor.reason for tensor in plan.tensors if tensor.action == "copy")),
        "bytes_read": sum(plan.aligned.stored_bytes(tensor.name) + plan.base.stored_bytes(tensor.base_name) for tensor in plan.edited),
        "bytes_written": factors_bytes(plan),
        "recipe": plan.recipe.to_json(),
        "warnings": plan.warnings,
    }


def _build_document(plan: Plan, job: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the file's metadata says beside its matrices. A function of sources and settings alone: no times, no folders."""
    hashes: dict[str, dict[str, str]] = {"base": {}, "aligned": {}}
    for record in records:
        for role, found in record["sources"].items():
            hashes[role].update(found)
    sources = {}
    for checkpoint in (plan.base, plan.aligned):
        files = {
            name: {"size": checkpoint.weight_headers[name].file_size, "sha256": digest} for name, digest in sorted(hashes[checkpoint.role].items())
        }
        sources[checkpoint.role] = checkpoint.source.identity() | {"files": files}
    skipped = [name for record in records for name in record["skipped"]]
    return {"format": FORMAT, "job": job, "sources": sources, "warnings": plan.warnings, "non_finite": skipped}


def _document(path: Path) -> dict[str, Any] | None:
    try:
        found = read_document(read_header(path, path.name).metadata)
    except CheckpointFormatError:
        return None
    return None if found is None or factors_damage(found) else found


def _work_folder(path: Path) -> Path:
    return path.parent / f".{path.name}.parts"
