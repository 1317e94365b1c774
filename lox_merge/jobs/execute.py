"""Carrying out a plan: lock, resume, write shards, complete, finish. The same for every edit."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lox_merge.checkpoint.checkpoint import SINGLE_INDEX
from lox_merge.errors import Interrupted, LoxMergeWarning, NonFiniteDeltaError, OutputError, SourceChangedError
from lox_merge.jobs.atomic import copy_atomically, json_bytes, sha256_of, sync_folder, write_atomically
from lox_merge.jobs.beforehand import check_model_job
from lox_merge.jobs.engine import Progress
from lox_merge.jobs.executors.choose import PROCESSES, choose_executor
from lox_merge.jobs.executors.run import run
from lox_merge.jobs.executors.sizing import Workers
from lox_merge.jobs.factors import source_difference
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.low_disk import Passing
from lox_merge.jobs.manifest import build_manifest
from lox_merge.jobs.output_folder import MANIFEST
from lox_merge.jobs.plan import Plan, check_disk, output_config

# Below this share of the intended update the written weights are not what was asked for (bf16 can keep under half).
WANTED_GAIN = 0.95


@dataclass(frozen=True)
class JobResult:
    """A finished job. seconds: wall time of this call. resumed_shards: taken over from an earlier call. workers: that wrote shards."""

    out: Path
    manifest: dict[str, Any]
    seconds: float
    resumed_shards: int
    bytes_read: int
    bytes_written: int
    workers: int = 1

    def report(self, command: str) -> dict[str, Any]:
        """For --json: the manifest's summary, recipe and sources, and this call's times."""
        return {
            "command": command,
            "output": self.out.name,
            "seconds": self.seconds,
            "resumed_shards": self.resumed_shards,
            "workers": self.workers,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "summary": self.manifest["summary"],
            "job": self.manifest["job"],
            "sources": self.manifest["sources"],
            "warnings": self.manifest["warnings"],
            "tensors": self.manifest["tensors"],
        }


class Silent:
    """Progress that nobody watches."""

    def advance(self, count: int) -> None:
        pass


def carry_out(
    plan: Plan,
    *,
    device: str,
    overwrite: bool,
    progress: Progress | None,
    check: Callable[[Plan, Journal], None],
    begin: Callable[[Plan, Journal], None] = lambda plan, journal: None,
    workers: Workers = 1,
    executor: str = PROCESSES,
    stacklevel: int = 4,
) -> JobResult:
    """Writes what `plan` says. stacklevel: whose call the warnings are about, seen from here.

    workers: how many write shards at a time, 1 is this process alone; executor: as what. The bytes are the same.
    check: looks at the weights before anything is written, and raises RequestError where they are not what the edit is for.
    begin: what the edit has to know of all weights before the first shard; runs once the output is locked.
    """
    started = time.perf_counter()
    target, job, journal = check_model_job(plan, device=device, workers=workers, executor=executor, overwrite=overwrite)
    if not overwrite:
        done = already_done(plan, journal)
        if done is not None:
            return JobResult(plan.out, done, time.perf_counter() - started, len(plan.shards), 0, 0)
    plan.fetch()
    if plan.passing is None:
        check(plan, journal)
    for text in plan.warnings:
        warnings.warn(text, LoxMergeWarning, stacklevel=stacklevel)
    chosen = choose_executor(executor, workers, plan, target, stacklevel=stacklevel)
    try:
        with journal.locked():
            if plan.passing is not None and (overwrite or not journal.begun):
                _check_passing(plan, plan.passing, journal, check)
            if overwrite:
                journal.clear()
            journal.begin(job, plan.store)
            if plan.store:
                plan.store.prepare()
            with abandoned_where_not_finite(journal, plan.files):
                begin(plan, journal)
                resumed = sum(bool(journal.sent(shard.file)) if plan.store else (plan.out / shard.file).is_file() for shard in plan.shards)
                check_disk(plan, sum(shard.header.file_size for shard in plan.shards if (plan.out / shard.file).is_file()))
                records = run(plan, journal, target, progress or Silent(), chosen)
            manifest = build_manifest(plan, job, records, _write_side_files(plan, journal))
            write_atomically(plan.out / MANIFEST, json_bytes(manifest), journal.folder)
            sync_folder(plan.out)
            if plan.store is None:  # else what is in the store is still to be shown
                journal.end()
    except KeyboardInterrupt:
        kept = "Shards that were sent are kept out of sight on the Hub" if plan.store else f"Finished shards are kept in {plan.out}"
        raise Interrupted(f"interrupted. {kept}; run the same command again to go on, or pass --overwrite to start anew.") from None
    return JobResult(plan.out, manifest, time.perf_counter() - started, resumed, plan.bytes_read, plan.bytes_written, chosen.workers)


@contextmanager
def abandoned_where_not_finite(journal: Journal, files: Sequence[str]) -> Iterator[None]:
    """Takes the job back where a delta is not finite: it can never be finished as asked. files: what it may have written.

    The output has to be locked, or it may be another's by then.
    """
    try:
        yield
    except NonFiniteDeltaError:
        journal.abandon(files)
        raise


def _check_passing(plan: Plan, passing: Passing, journal: Journal, check: Callable[[Plan, Journal], None]) -> None:
    """The check of weights that pass through the disk: only under the lock, since that writes into the folder. A job that was begun
    passed it before."""
    try:
        check(plan, journal)
    except BaseException:
        passing.clear()
        if not journal.begun:
            journal.withdraw()
        raise


def already_done(plan: Plan, journal: Journal) -> dict[str, Any] | None:
    """The manifest of a finished output of this very job, after checking its files. None when there is work to do."""
    manifest = journal.manifest()
    if manifest is None:
        return None
    shards = [] if plan.store else manifest["output"]["shards"]
    entries = {entry["file"]: entry["sha256"] for entry in shards} | manifest["output"]["files"]
    damaged = [file for file, digest in entries.items() if not (plan.out / file).is_file() or sha256_of(plan.out / file) != digest]
    if damaged:
        raise OutputError(
            f"{plan.out} is a finished output, but {', '.join(damaged[:4])} is missing or not what was written. Pass --overwrite to make it again."
        )
    if changed := _changed_sources(plan, manifest):
        raise SourceChangedError(
            f"{plan.out} is a finished output, and was made from other files: {'; '.join(changed[:4])}. "
            "Restore them, choose another folder, or pass --overwrite to make it again."
        )
    if plan.store is None and journal.folder.exists():  # stopped between manifest and clean-up
        with journal.locked():
            journal.end()
    return manifest


def _changed_sources(plan: Plan, manifest: dict[str, Any]) -> list[str]:
    """What shows that files of local folders are not those that a finished output was made from. They are read through."""
    found = [text for role, checkpoint in plan.checkpoints.items() if (text := source_difference(manifest["sources"][role], checkpoint))]
    mirrored, written = plan.mirrored, manifest["output"]["files"]
    if mirrored.source.identity().get("commit") is not None:
        return found
    config = output_config(plan)
    for name in plan.side_files:
        own = name == "config.json" and config is not None
        if name in written and (hashlib.sha256(config or b"").hexdigest() if own else sha256_of(mirrored.source.path(name))) != written[name]:
            found.append(f"{mirrored.role}: {name} has other contents")
    return found


def _write_side_files(plan: Plan, journal: Journal) -> dict[str, str]:
    """Everything beside the shards and the manifest, the index last. Returns sha256 by name."""
    config = output_config(plan)
    hashes = {}
    for name in sorted(plan.side_files, key=lambda name: name == "config.json"):
        if name == "config.json" and config is not None:
            hashes[name] = write_atomically(plan.out / name, config, journal.folder)
        else:
            hashes[name] = copy_atomically(plan.mirrored.source.path(name), plan.out / name, journal.folder)
    index = plan.index()
    if index is not None and plan.keeps_index:
        hashes[SINGLE_INDEX] = copy_atomically(plan.mirrored.source.path(SINGLE_INDEX), plan.out / SINGLE_INDEX, journal.folder)
    elif index is not None:
        hashes[SINGLE_INDEX] = write_atomically(plan.out / SINGLE_INDEX, json_bytes(index), journal.folder)
    for folder in sorted({(plan.out / name).parent for name in hashes} - {plan.out}):  # that one is synced with the manifest
        sync_folder(folder)
    return dict(sorted(hashes.items()))


def warn_about_gain(gain: float | None, worst: float | None, worst_name: str | None, remedy: str, stacklevel: int = 4) -> None:
    """Warns where rounding lost much of the edit. remedy: what can be done beside another rounding or dtype."""
    if gain is not None and gain < WANTED_GAIN:
        warnings.warn(
            f"rounding to the output dtype kept only {gain:.2f} of the edit (gain, 1 is all; the worst is "
            f"{worst_name} with {worst:.2f}). Remedies: --rounding feedback, --dtype float32{remedy}.",
            LoxMergeWarning,
            stacklevel=stacklevel,
        )
