"""Matrices are edited ahead of the writer: side by side, within the memory that the plan allows."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tiny_models import make_pair

from lox_merge.jobs import ahead, direct_file
from lox_merge.jobs.ahead import Ahead
from lox_merge.jobs.direct_file import BLOCK
from lox_merge.jobs.edit import Edit
from lox_merge.jobs.execute import Silent
from lox_merge.jobs.executors.run import run
from lox_merge.jobs.executors.serial import Serial
from lox_merge.jobs.harden import harden, plan_hardening
from lox_merge.jobs.in_flight import InFlight
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.manifest import job_description
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.select import TensorPlan
from lox_merge.jobs.work import Crew, CrewSize

# Longer than any of this takes, shorter than anybody waits.
PATIENCE = 20.0


class Watched:
    """An edit that says before which matrix it is, and after which."""

    def __init__(self, edit: Edit, before: Callable[[str], object], after: Callable[[str], object] = lambda _name: None) -> None:
        self._edit, self._before, self._after = edit, before, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._edit, name)

    def matrix(self, sources: Any, out: Any, view: Any, tensor: TensorPlan, *others: Any) -> Any:
        self._before(tensor.name + view.label)
        try:
            return self._edit.matrix(sources, out, view, tensor, *others)
        finally:
            self._after(tensor.name + view.label)


def watched(plan: Plan, *looks: Callable[[str], object]) -> Plan:
    return replace(plan, edit=cast("Edit", Watched(plan.edit, *looks)))


def edited(plan: Plan) -> list[TensorPlan]:
    return [tensor for tensor in plan.shards[0].tensors if tensor.action == "edit"]


def test_work_goes_on_while_the_writer_waits_for_a_large_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(tmp_path, "llama", aligned_shards=1, vocabulary=2000, tie_word_embeddings=True)
    plan = plan_hardening(*pair, tmp_path / "out", recipe=Recipe())
    first, *others = edited(plan)
    costs = [plan.working_memory(tensor, tensor.views[0]) for tensor in others]
    # Room for what they give, and for the work on two of them at a time.
    room = sum(plan.shards[0].bytes_in_memory(tensor) for tensor in others) + 2 * max(costs)
    assert room < sum(costs) and plan.working_memory(first, first.views[0]) > room
    monkeypatch.setattr(ahead, "IN_FLIGHT_BYTES", room)
    large, done = threading.Event(), threading.Semaphore(0)
    plan = watched(
        plan,
        lambda name: large.wait(PATIENCE) if name == first.name else None,
        lambda name: done.release() if name != first.name else None,
    )
    crew = Crew(torch.device("cpu"), CrewSize(2, 1))
    looking = Ahead(plan, [0], crew)
    writer = threading.Thread(target=looking.take, args=(first,))
    writer.start()
    try:
        finished = [done.acquire(timeout=PATIENCE / 10) for _ in others]
    finally:
        large.set()
        writer.join(PATIENCE)
        crew.close()
    assert all(finished) and len(finished) >= 14


def test_parts_of_a_tensor_larger_than_the_memory_for_work_go_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(tmp_path, "gpt_oss", aligned_shards=1, num_local_experts=64)
    plan = plan_hardening(*pair, tmp_path / "out", recipe=Recipe())
    stacked = max(edited(plan), key=lambda tensor: len(tensor.views))
    room = 2 * plan.working_memory(stacked, stacked.views[0])
    assert plan.shards[0].bytes_in_memory(stacked) > room + plan.largest_matrix_bytes
    monkeypatch.setattr(ahead, "IN_FLIGHT_BYTES", room)
    together = threading.Barrier(2, timeout=PATIENCE / 4)
    met = [0]

    def meet(name: str) -> None:
        if name.startswith(f"{stacked.name}["):
            together.wait()
            met[0] += 1

    plan = watched(plan, meet)
    crew = Crew(torch.device("cpu"), CrewSize(2, 1))
    try:
        looking = Ahead(plan, [0], crew)
        for tensor in edited(plan):
            looking.take(tensor)
            looking.release(tensor, plan.shards[0].bytes_in_memory(tensor))
    finally:
        crew.close()
    assert met[0] == len(stacked.views) >= 4


def test_the_disk_has_something_to_do_while_the_writer_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_file, "BUFFER_BYTES", BLOCK)  # these tensors would fit into the usual one
    pair = make_pair(tmp_path, "llama", aligned_shards=1, vocabulary=2000, hidden=128, tie_word_embeddings=True)
    expected = harden(*pair, tmp_path / "expected").out
    plan = plan_hardening(*pair, tmp_path / "out", recipe=Recipe())
    first, *others = edited(plan)
    (name,) = (shard.file for shard in plan.shards)
    whole = (expected / name).read_bytes()
    places = [plan.shards[0].header.tensors[tensor.written] for tensor in others]
    inside = [slice(-(-place.begin // BLOCK) * BLOCK, place.end // BLOCK * BLOCK) for place in places]
    assert all(whole[blocks] for blocks in inside)
    early = []

    def wait_for_the_others(matrix: str) -> None:
        """Until the unfinished file holds all whole blocks of them, though the first tensor is not there."""
        partial, until = Journal(plan.out).partial(name), time.monotonic() + PATIENCE
        while matrix == first.name and not early and time.monotonic() < until:
            found = partial.read_bytes()
            if all(found[blocks] == whole[blocks] for blocks in inside):
                early.append(found[plan.shards[0].header.tensors[first.written].begin :][: first.info.bytes])
            time.sleep(0.01)

    plan = watched(plan, wait_for_the_others)
    journal = Journal(plan.out)
    with journal.locked():
        journal.begin(job_description(plan, torch.device("cpu")))
        (record,) = run(plan, journal, torch.device("cpu"), Silent(), Serial())
    assert early == [bytes(first.info.bytes)], "a hole"
    assert (plan.out / name).read_bytes() == whole
    assert record["output"]["sha256"] == hashlib.sha256(whole).hexdigest()


def test_memory_counts_until_work_ends_not_until_it_is_taken() -> None:
    in_flight = InFlight(10)
    first, second = Future[int](), Future[int]()
    in_flight.watch(first, 4)
    in_flight.watch(second, 5)
    in_flight.add(3)
    assert in_flight.room == -2
    waited = threading.Event()

    def wait() -> None:
        in_flight.wait(first)
        waited.set()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    assert not waited.wait(0.1), "nothing has ended"
    second.set_exception(ValueError("so does work that fails"))
    assert waited.wait(PATIENCE) and in_flight.room == 3
    waiting.join(PATIENCE)
    again = threading.Thread(target=in_flight.wait, args=(first,), daemon=True)
    again.start()
    again.join(0.1)
    assert again.is_alive(), "an end that was seen is no new one"
    first.set_result(1)
    again.join(PATIENCE)
    assert not again.is_alive() and in_flight.room == 7
    in_flight.add(-3)
    assert in_flight.room == 10
