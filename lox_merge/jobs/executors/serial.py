"""One shard after another in this process, matrices ahead of the writer."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lox_merge.jobs.direct_file import DirectFile
from lox_merge.jobs.engine import finish_shard, make_durable, typical_cost, write_shard
from lox_merge.jobs.executors.protocol import ShardJob
from lox_merge.jobs.lookahead import LookAhead, look_ahead
from lox_merge.jobs.work import Crew, CrewSize


@dataclass(frozen=True)
class Serial:
    """See jobs.executors.protocol.Executor. look_ahead: who edits."""

    reads_ahead: int = 1
    workers: int = 1
    look_ahead: LookAhead = look_ahead

    def write(self, job: ShardJob, todo: Sequence[int]) -> dict[int, dict[str, Any]]:
        plan, passing = job.plan, job.plan.passing
        crew = Crew(job.device, CrewSize.of(job.device, typical_cost(plan)))
        finisher = ThreadPoolExecutor(1, thread_name_prefix="finish")
        try:
            with crew.threads():
                written: list[tuple[int, Future[dict[str, Any]]]] = []
                ahead = self.look_ahead(plan, list(todo), crew)
                if passing:
                    passing.start(todo)
                for position in todo:
                    if passing:
                        passing.bring(position)
                    ahead.reach(position)
                    job.hasher.start_shard(position)
                    file, record = write_shard(plan, position, job.journal.partial(plan.shards[position].file), ahead, job.progress)
                    if written:
                        written[-1][1].result()  # at most one finished shard waits for the disk
                    written.append((position, finisher.submit(_finish, job, file, position, record)))
                    if passing:
                        written[-1][1].result()  # its sources make room for the next shard's
                        passing.finish(position)
                return {position: future.result() for position, future in written}
        finally:
            crew.close()
            finisher.shutdown(wait=True)


def _finish(job: ShardJob, file: DirectFile, position: int, record: dict[str, Any]) -> dict[str, Any]:
    partial = job.journal.partial(job.plan.shards[position].file)
    make_durable(file, partial)
    return finish_shard(job.plan, position, partial, record, job.journal, job.hasher.hashes(position))
