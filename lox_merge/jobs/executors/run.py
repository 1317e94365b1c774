"""Writing every shard that is not finished yet, by whichever executor."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lox_merge.jobs.engine import Progress, by_role, first_stamp, source_path
from lox_merge.jobs.executors.protocol import Executor, ShardJob
from lox_merge.jobs.hashing import SourceHasher
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.store import recorded_hashes


def run(plan: Plan, journal: Journal, device: torch.device, progress: Progress, executor: Executor) -> list[dict[str, Any]]:
    """Takes over the shards that are finished and has the others written. Returns one record per shard, in order.

    Raises NonFiniteDeltaError, WriteError, SourceChangedError, NumericalError; finished shards stay.
    """
    needed = [shard.sources(plan.checkpoints) for shard in plan.shards]
    ahead = executor.reads_ahead if plan.passing is None else 0
    hasher = SourceHasher(needed, partial(source_path, plan), partial(first_stamp, plan), ahead)
    records: dict[int, dict[str, Any]] = {}
    try:
        for position, shard in enumerate(plan.shards):
            record = journal.sent(shard.file) if plan.store else journal.finished(shard.file)
            if record is not None:
                known = recorded_hashes(plan.checkpoints, record) if plan.store else plan.passing.known(record) if plan.passing else None
                journal.check_sources(record, by_role(hasher.hashes(position, known), plan.checkpoints))
                progress.advance(shard.header.file_size)
                records[position] = record
        todo = [position for position in range(len(plan.shards)) if position not in records]
        journal.sweep()
        if todo:
            records |= executor.write(ShardJob(plan, journal, device, hasher, progress), todo)
    finally:
        hasher.close()
        plan.close()
    return [records[position] for position in range(len(plan.shards))]
