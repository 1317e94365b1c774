"""The main job: base and aligned in, hardened checkpoint out."""

from __future__ import annotations

import shutil
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lox_merge.checkpoint.checkpoint import SINGLE_INDEX, Checkpoint, open_checkpoint
from lox_merge.errors import Interrupted, LoxMergeWarning, NonFiniteDeltaError, OutputError, PlanError, RequestError, SourceError
from lox_merge.jobs.atomic import json_bytes, sha256_of, sync_folder, write_atomically
from lox_merge.jobs.engine import Progress, run
from lox_merge.jobs.factors import Factors, open_factors
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.manifest import Summary, build_manifest, job_description
from lox_merge.jobs.plan import MANIFEST, WORK_FOLDER, Plan, check_disk, check_output, make_plan, output_config
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.triplets import FromFactors

# Below this share of the intended update the written weights are not what was asked for (FACTS: bf16 can keep under half).
WANTED_GAIN = 0.95


@dataclass(frozen=True)
class HardenResult:
    """A finished hardening. seconds: wall time of this call. resumed_shards: taken over from an earlier call."""

    out: Path
    manifest: dict[str, Any]
    seconds: float
    resumed_shards: int
    bytes_read: int
    bytes_written: int

    @property
    def summary(self) -> Summary:
        return Summary(**self.manifest["summary"])

    def to_json(self) -> dict[str, Any]:
        """For --json: the manifest's summary, recipe and sources, and this call's times."""
        return {
            "command": "harden",
            "output": self.out.name,
            "seconds": self.seconds,
            "resumed_shards": self.resumed_shards,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "summary": asdict(self.summary),
            "job": self.manifest["job"],
            "sources": self.manifest["sources"],
            "warnings": self.manifest["warnings"],
            "tensors": self.manifest["tensors"],
        }


class Silent:
    """Progress that nobody watches."""

    def advance(self, count: int) -> None:
        pass


def resolve_device(name: str) -> torch.device:
    """'auto', 'cpu', 'cuda' or 'cuda:n' as a torch device. Raises RequestError where it is not there."""
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


def plan_hardening(
    base: str | Path,
    aligned: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    factors: Factors | None = None,
    order_is_right: bool = False,
    cache_dir: Path | None = None,
) -> Plan:
    """Preflight alone: opens both checkpoints (headers only) and checks the whole job. Raises PlanError or SourceError.

    factors: of this pair, to spend no SVD (stays open as long as the plan is used); the weight files of local folders are read to
    see that they are of this pair. Raises RequestError where they are not, or hold too few triplets.
    """
    opened: dict[str, Checkpoint] = {}
    problems: list[str] = []
    for role, source in (("base", base), ("aligned", aligned)):
        try:
            opened[role] = open_checkpoint(source, role, cache_dir)
        except PlanError as error:
            problems += error.problems
        except SourceError as error:
            problems.append(str(error))
    if problems:
        raise PlanError(problems)
    plan = make_plan(opened["base"], opened["aligned"], Path(out), recipe or Recipe(), order_confirmed=order_is_right)
    if factors is not None:
        held = FromFactors(factors)
        held.check(plan.edited)
        factors.check(plan.base, plan.aligned)
        plan.triplets = held
    return plan


def harden(
    base: str | Path,
    aligned: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    factors: str | Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    order_is_right: bool = False,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> HardenResult:
    """Writes W_align + alpha · Proj_k(W_align − W_base) to the folder `out` (LoX, arXiv 2506.15606).

    base, aligned: folders or Hub ids `org/name[@revision]`. The output has aligned's shard files, names, order, dtypes and
    side files. factors: file of `decompose` for this pair; no SVD is spent then. Called again after an interruption it goes on
    with the shards that are finished; finished output of the same job is checked and returned. Raises RequestError (exit 2)
    before anything is written, LoxMergeError afterwards.
    """
    with open_factors(factors) as held:
        plan = plan_hardening(base, aligned, out, recipe=recipe, factors=held, order_is_right=order_is_right, cache_dir=cache_dir)
        return execute(plan, device=device, overwrite=overwrite, progress=progress)


def execute(plan: Plan, *, device: str = "auto", overwrite: bool = False, progress: Progress | None = None) -> HardenResult:
    """Carries out a plan; see `harden`."""
    started = time.perf_counter()
    target = resolve_device(device)
    job = job_description(plan, target)
    journal = Journal(plan.out)
    check_output(plan.out, overwrite=overwrite)
    if not overwrite:
        journal.check(job)
        done = _already_done(plan, journal)
        if done is not None:
            return HardenResult(plan.out, done, time.perf_counter() - started, len(plan.shards), 0, 0)
    fresh = not (plan.out / WORK_FOLDER).exists()
    if fresh:
        check_disk(plan)
    plan.fetch()
    check_some_delta(plan)
    for text in plan.warnings:
        warnings.warn(text, LoxMergeWarning, stacklevel=3)
    try:
        with journal.locked():
            if overwrite:
                journal.clear()
            journal.begin(job)
            resumed = sum((plan.out / shard.file).is_file() for shard in plan.shards)
            check_disk(plan, sum(shard.header.file_size for shard in plan.shards if (plan.out / shard.file).is_file()))
            records = run(plan, journal, target, progress or Silent())
            manifest = build_manifest(plan, job, records, _write_side_files(plan, journal))
            write_atomically(plan.out / MANIFEST, json_bytes(manifest), journal.folder)
            sync_folder(plan.out)
            journal.end()
    except NonFiniteDeltaError:
        journal.abandon()
        raise
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted. Finished shards are kept in {plan.out}; run the same command again to go on, or pass --overwrite to start anew."
        ) from None
    result = HardenResult(plan.out, manifest, time.perf_counter() - started, resumed, plan.bytes_read, plan.bytes_written)
    _warn_about(result.summary)
    return result


def check_some_delta(plan: Plan) -> None:
    """Raises RequestError when every delta is zero. Reads smallest tensors first and stops at the first difference."""
    for tensor in sorted(plan.edited, key=lambda tensor: tensor.info.size):
        base, aligned = plan.base.tensor(tensor.base_name), plan.aligned.tensor(tensor.name)
        if base.dtype != aligned.dtype or not torch.equal(base, aligned):
            return
    raise RequestError(
        f"all {len(plan.edited)} deltas are zero: base ({plan.base.title}) and aligned ({plan.aligned.title}) hold the same weights. "
        "The likely mistake: one model was given twice, or base is a copy of aligned. Give the model that aligned was trained from as base."
    )


def _already_done(plan: Plan, journal: Journal) -> dict[str, Any] | None:
    """The manifest of a finished output of this very job, after checking its files. None when there is work to do."""
    manifest = journal.manifest()
    if manifest is None:
        return None
    entries = {entry["file"]: entry["sha256"] for entry in manifest["output"]["shards"]} | manifest["output"]["files"]
    damaged = [file for file, digest in entries.items() if not (plan.out / file).is_file() or sha256_of(plan.out / file) != digest]
    if damaged:
        raise OutputError(
            f"{plan.out} is a finished output, but {', '.join(damaged[:4])} is missing or not what was written. Pass --overwrite to make it again."
        )
    if journal.folder.exists():  # stopped between manifest and clean-up
        shutil.rmtree(journal.folder, ignore_errors=True)
    return manifest


def _write_side_files(plan: Plan, journal: Journal) -> dict[str, str]:
    """Everything beside the shards and the manifest, the index last. Returns sha256 by name."""
    config = output_config(plan)
    hashes = {}
    for name in sorted(plan.side_files, key=lambda name: name == "config.json"):
        data = config if name == "config.json" and config is not None else plan.aligned.source.path(name).read_bytes()
        hashes[name] = write_atomically(plan.out / name, data, journal.folder)
    index = plan.index()
    if index is not None:
        data = plan.aligned.source.path(SINGLE_INDEX).read_bytes() if plan.keeps_index else json_bytes(index)
        hashes[SINGLE_INDEX] = write_atomically(plan.out / SINGLE_INDEX, data, journal.folder)
    return dict(sorted(hashes.items()))


def _warn_about(summary: Summary) -> None:
    if summary.realised_gain is not None and summary.realised_gain < WANTED_GAIN:
        warnings.warn(
            f"rounding to the output dtype kept only {summary.realised_gain:.2f} of the edit (gain, 1 is all; the worst is "
            f"{summary.smallest_gain_tensor} with {summary.smallest_gain:.2f}). Remedies: --rounding feedback, --dtype float32, "
            "or shipping the update as a rank-k adapter beside the aligned weights.",
            LoxMergeWarning,
            stacklevel=3,
        )
