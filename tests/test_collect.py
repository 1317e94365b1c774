"""What workers tell, put together, in the orders that no run makes on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_pair

from lox_merge.errors import LoxMergeWarning
from lox_merge.jobs.engine import source_path
from lox_merge.jobs.execute import Silent
from lox_merge.jobs.executors.collect import Collected
from lox_merge.jobs.executors.protocol import ShardJob
from lox_merge.jobs.executors.writer import ShardWriter, WorkerTask
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.hashing import SourceHasher
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.manifest import job_description
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.work import CrewSize

CPU = torch.device("cpu")


class Worker:
    """Writes what it is given in this process, and keeps what it has to tell."""

    def __init__(self, plan: Plan, mark: str) -> None:
        self.task = WorkerTask(plan, CPU, CrewSize(1, 1), None, mark)
        self.held: list[int] = []
        self.orders: list[Any] = []

    def send(self, order: object) -> None:
        self.orders.append(order)

    def work(self) -> list[tuple[Any, ...]]:
        """Everything that it tells of the orders it has."""
        told: list[tuple[Any, ...]] = []
        writer = ShardWriter(replace(self.task), lambda *event: told.append(event))
        for order in self.orders:
            writer.write(*order)
        writer.wait()
        writer.close()
        self.orders.clear()
        return told


@contextmanager
def collecting(plan: Plan) -> Iterator[Collected]:
    journal = Journal(plan.out)
    needed = [shard.sources(plan.checkpoints) for shard in plan.shards]
    hasher = SourceHasher(needed, lambda file: source_path(plan, file), ahead=0)
    with journal.locked():
        journal.begin(job_description(plan, CPU))
        yield Collected(ShardJob(plan, journal, CPU, hasher, Silent()), range(len(plan.shards)))
    hasher.close()


@pytest.mark.parametrize("told", ["written, nothing hashed", "written, one of two hashed", "all hashed, not written"])
def test_a_worker_that_is_lost_before_all_is_told(tmp_path: Path, told: str) -> None:
    """Of a shard that is written the sources may be unread; another worker reads them then, and the run comes to its end."""
    plan = plan_hardening(*make_pair(tmp_path, "llama", aligned_shards=2), tmp_path / "out")
    with collecting(plan) as collected:
        first = Worker(plan, ".1")
        collected.take(first, "started")
        events = first.work()
        hashed = [event for event in events if event[0] == "hashed"]
        written = [event for event in events if event[0] == "written"]
        assert len(hashed) == 2 and len(written) == 1
        heard = {"written, nothing hashed": written, "written, one of two hashed": [*written, hashed[0]], "all hashed, not written": hashed}[told]
        for event in heard:
            collected.take(first, *event)
        collected.take(first, "free")
        assert not collected.records
        with pytest.warns(LoxMergeWarning, match="lost by signal SIGKILL while it wrote model-00001.*, model-00002"):
            collected.lost(first, "signal SIGKILL")
        second = Worker(plan, ".2")
        collected.take(second, "started")
        for _ in plan.shards:
            for event in second.work():
                collected.take(second, *event)
        assert collected.complete and not second.held
        assert all((plan.out / shard.file).is_file() for shard in plan.shards)


def test_a_worker_that_is_lost_after_all_is_told(tmp_path: Path) -> None:
    plan = plan_hardening(*make_pair(tmp_path, "llama", aligned_shards=2), tmp_path / "out")
    with collecting(plan) as collected:
        first = Worker(plan, ".1")
        collected.take(first, "started")
        for event in first.work():
            if event[0] != "free":
                collected.take(first, *event)
        assert list(collected.records) == [0] and not first.held
        collected.lost(first, "signal SIGKILL")
        assert list(collected.records) == [0]
