"""The streaming engine: reads what a shard needs, edits, writes; one shard after another, matrices ahead of the writer."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from lox_merge.checkpoint import dtypes
from lox_merge.checkpoint.weights import tensor_bytes
from lox_merge.errors import NonFiniteDeltaError
from lox_merge.jobs.ahead import Ahead
from lox_merge.jobs.atomic import write_error
from lox_merge.jobs.hashing import SourceFile, SourceHasher
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.plan import Plan, ShardPlan
from lox_merge.jobs.select import TensorPlan
from lox_merge.jobs.work import Crew


class Progress(Protocol):
    """Told how many bytes of the output are done."""

    def advance(self, count: int) -> None: ...


def run(plan: Plan, journal: Journal, device: torch.device, progress: Progress) -> list[dict[str, Any]]:
    """Writes every shard that is not finished yet. Returns one record per shard, in order.

    Raises NonFiniteDeltaError, WriteError, SourceChangedError, NumericalError; finished shards stay.
    """
    needed = [shard.sources(plan.checkpoints) for shard in plan.shards]
    passing = plan.passing
    hasher = SourceHasher(needed, lambda file: source_path(plan, file), ahead=1 if passing is None else 0)
    records: list[dict[str, Any] | None] = []
    try:
        for position, shard in enumerate(plan.shards):
            record = journal.finished(shard.file)
            if record is not None:
                known = passing.known(record) if passing else None
                journal.check_sources(record, by_role(hasher.hashes(position, known), plan.checkpoints))
                progress.advance(shard.header.file_size)
            records.append(record)
        todo = [position for position, record in enumerate(records) if record is None]
        crew = Crew(device, typical_cost(plan))
        finisher = ThreadPoolExecutor(1, thread_name_prefix="finish")
        try:
            with crew.threads():
                written: list[tuple[int, Future[dict[str, Any]]]] = []
                ahead = Ahead(plan, todo, crew)
                if passing:
                    passing.start(todo)
                for position in todo:
                    if passing:
                        passing.bring(position)
                    ahead.reach(position)
                    hasher.start_shard(position)
                    file, record = _write_shard(plan, position, journal, ahead, progress)
                    if written:
                        written[-1][1].result()  # at most one finished shard waits for the disk
                    written.append((position, finisher.submit(_finish_shard, file, plan, position, record, journal, hasher)))
                    if passing:
                        written[-1][1].result()  # its sources make room for the next shard's
                        passing.finish(position)
                for position, future in written:
                    records[position] = future.result()
        finally:
            crew.close()
            finisher.shutdown(wait=True)
    finally:
        hasher.close()
        plan.close()
    return [record for record in records if record is not None]


def source_path(plan: Plan, file: SourceFile) -> Path:
    """Where a source file of the plan is on disk."""
    role, name = file
    return plan.checkpoints[role].source.path(name)


def by_role(hashes: dict[SourceFile, str], roles: Iterable[str]) -> dict[str, dict[str, str]]:
    """sha256 by file name for each role."""
    grouped: dict[str, dict[str, str]] = {role: {} for role in roles}
    for (role, name), digest in hashes.items():
        grouped[role][name] = digest
    return grouped


def typical_cost(plan: Plan) -> int:
    """Working memory of the matrix in the middle of the work, by bytes: what the crew's size is chosen for."""
    costs = sorted(plan.edit.working_memory(view.shape, tensor) for tensor in plan.edited for view in tensor.views)
    total, half = 0, sum(costs) / 2
    for cost in costs:
        total += cost
        if total >= half:
            return cost
    return 1


def _write_shard(plan: Plan, position: int, journal: Journal, ahead: Ahead, progress: Progress) -> tuple[IO[bytes], dict[str, Any]]:
    """Writes one shard to its temporary file. Returns it open (not yet synced) and its record without hashes of sources."""
    shard = plan.shards[position]
    path = journal.partial(shard.file)
    digest = hashlib.sha256()
    tensors: list[dict[str, Any]] = []
    try:
        file = path.open("wb", buffering=0)
        try:
            _put(file, shard.header.raw, digest)
            for tensor in shard.tensors:
                size = shard.header.tensors[tensor.name].bytes
                for data, record in _tensor_data(plan, shard, tensor, ahead):
                    _put(file, data, digest)
                    tensors.append(record)
                if tensor.action == "edit":
                    ahead.release(tensor, size)
                progress.advance(size)
            progress.advance(len(shard.header.raw))
        except BaseException:
            file.close()
            path.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise write_error(path, error) from error
    output = {"file": shard.file, "size": shard.header.file_size, "sha256": digest.hexdigest()}
    return file, {"output": output, "sources": {}, "tensors": tensors}


def _put(file: IO[bytes], data: bytes | memoryview, digest: Any) -> None:
    view = memoryview(data)
    digest.update(view)
    while view:
        view = view[file.write(view) :]


def _tensor_data(plan: Plan, shard: ShardPlan, tensor: TensorPlan, ahead: Ahead) -> Iterator[tuple[memoryview, dict[str, Any]]]:
    """The bytes to write for one tensor and its record (a generator, so that they are gone before the next is taken)."""
    target = shard.header.tensors[tensor.name]
    record: dict[str, Any] = {"name": tensor.name, "shape": list(target.shape), "dtype": target.dtype}
    if tensor.action == "copy":
        stored = plan.mirrored.tensor(tensor.name)
        if target.dtype != tensor.info.dtype:
            stored = stored.to(dtypes.torch_dtype(target.dtype))
        yield tensor_bytes(stored), record | {"action": "copied", "reason": tensor.reason}
        return
    out, results = ahead.take(tensor)
    if any(result.bad for result in results) and not plan.recipe.skip_non_finite:
        raise NonFiniteDeltaError(count_non_finite(plan))
    if any(result.changed for result in results):
        record |= {"action": "edited", **plan.edit.tensor_record(tensor)}
        record["matrices"] = [result.to_json() for result in results]
    else:
        reason = "NaN or Inf in the delta" if any(result.bad for result in results) else plan.edit.unchanged
        record |= {"action": "copied", "reason": reason}
    skipped = [result.label for result in results if result.bad]
    if skipped:
        record["non_finite"] = {"parts": skipped, "count": sum(result.bad for result in results)}
    yield tensor_bytes(out), record


def count_non_finite(plan: Plan) -> dict[str, int]:
    """Every tensor to be edited whose deltas hold NaN or Inf, with the number of such entries: one message names all."""
    counts = {}
    for position, shard in enumerate(plan.shards):
        for tensor in shard.tensors:
            bad = _non_finite(plan, tensor) if tensor.action == "edit" else 0
            if bad:
                counts[tensor.name] = bad
        if plan.passing:
            plan.passing.drop(plan.passing.needed[position])
    return counts


def _non_finite(plan: Plan, tensor: TensorPlan) -> int:
    stored = [checkpoint.tensor(tensor.name_in(role)).reshape(-1) for role, checkpoint in plan.checkpoints.items()]
    bad, step = 0, 2**24
    for start in range(0, stored[0].numel(), step):
        values = [part[start : start + step].float() for part in stored]
        finite = [torch.isfinite(later - earlier) for earlier, later in itertools.pairwise(values)]
        bad += int((~torch.stack(finite).all(0)).sum())
    return bad


def _finish_shard(file: IO[bytes], plan: Plan, position: int, record: dict[str, Any], journal: Journal, hasher: SourceHasher) -> dict[str, Any]:
    """Makes a written shard durable under its name, then records it."""
    shard = plan.shards[position]
    path = journal.out / shard.file
    try:
        with file:
            os.fsync(file.fileno())
        record["sources"] = by_role(hasher.hashes(position), plan.checkpoints)
        path.parent.mkdir(parents=True, exist_ok=True)
        journal.partial(shard.file).replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    journal.record(shard.file, record)
    return record
