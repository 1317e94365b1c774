"""The streaming engine: reads what a shard needs, edits, writes it to a temporary file, puts it in its place."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lox_merge.checkpoint import dtypes
from lox_merge.checkpoint.weights import tensor_bytes
from lox_merge.errors import NonFiniteDeltaError, NumericalError
from lox_merge.jobs.ahead import Early
from lox_merge.jobs.atomic import write_error
from lox_merge.jobs.direct_file import DirectFile
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.lookahead import LooksAhead
from lox_merge.jobs.plan import Plan, ShardPlan
from lox_merge.jobs.select import TensorPlan
from lox_merge.jobs.stamps import SourceFile, Stamp, stamp

# Bytes that are hashed in a thread: 0.5 ms, far more than handing them over takes.
_WORTH_A_THREAD = 2**20
# Entries that are looked at together: their masks take this many bytes.
_RANGE_PIECE = 2**22


class Progress(Protocol):
    """Told how many bytes of the output are done."""

    def advance(self, count: int) -> None: ...


def source_path(plan: Plan, file: SourceFile) -> Path:
    """Where a source file of the plan is on disk."""
    role, name = file
    return plan.checkpoints[role].source.path(name)


def first_stamp(plan: Plan, file: SourceFile) -> Stamp:
    """What a source file of the plan looked like before anything of it was read. Raises SourceChangedError where it is gone."""
    role, name = file
    return plan.checkpoints[role].source.seen(name) or stamp(file, source_path(plan, file))


def by_role(hashes: dict[SourceFile, str], roles: Iterable[str]) -> dict[str, dict[str, str]]:
    """sha256 by file name for each role."""
    grouped: dict[str, dict[str, str]] = {role: {} for role in roles}
    for (role, name), digest in hashes.items():
        grouped[role][name] = digest
    return grouped


def typical_cost(plan: Plan) -> int:
    """Working memory of the matrix in the middle of the work, by bytes: what the crew's size is chosen for."""
    costs = sorted(plan.working_memory(tensor, view) for tensor in plan.edited for view in tensor.views)
    total, half = 0, sum(costs) / 2
    for cost in costs:
        total += cost
        if total >= half:
            return cost
    return 1


def write_shard(plan: Plan, position: int, path: Path, ahead: LooksAhead, progress: Progress) -> tuple[DirectFile, dict[str, Any]]:
    """Writes one shard to its temporary file `path`. Returns it open (not yet synced) and its record without hashes of sources."""
    shard = plan.shards[position]
    tensors: list[dict[str, Any]] = []
    output = _Hashed()
    try:
        # A shard that goes to a store is read back at once.
        file = DirectFile(path, direct=plan.store is None)

        def early(tensor: TensorPlan, out: Tensor) -> None:
            """The disk has something to do while the writer waits for a large matrix, often the first of a shard."""
            if not (plan.requantised and tensor.stored):
                output.write(file, tensor_bytes(out), shard.header.tensors[tensor.written].begin)

        try:
            output.put(file, shard.header.raw, 0)
            for tensor in shard.tensors:
                begin, size = shard.header.tensors[tensor.written].begin, shard.header.tensors[tensor.written].bytes
                for data, record in _tensor_data(plan, shard, tensor, ahead, early):
                    output.put(file, data, begin)
                    tensors.append(record)
                if tensor.action == "edit":
                    ahead.release(tensor, shard.bytes_in_memory(tensor))
                progress.advance(size)
            file.flush()
            progress.advance(len(shard.header.raw))
        except BaseException:
            file.close()
            path.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        output.close()
    described = {"file": shard.file, "size": shard.header.file_size, "sha256": output.sha256}
    return file, {"output": described, "sources": {}, "tensors": tensors}


class _Hashed:
    """Writes pieces of a file and hashes them meanwhile: a core does either at about 1.5 GB/s. They are hashed in the order of the file."""

    def __init__(self) -> None:
        self._digest, self._there = hashlib.sha256(), set[tuple[int, int]]()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hash output")

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, file: DirectFile, data: bytes | memoryview, begin: int) -> None:
        """Only writes what begins at this place of the file."""
        file.write(data, begin)
        self._there.add((begin, memoryview(data).nbytes))

    def put(self, file: DirectFile, data: bytes | memoryview, begin: int) -> None:
        """The next piece of the file."""
        view = memoryview(data)
        beside = self._pool.submit(self._digest.update, view) if view.nbytes >= _WORTH_A_THREAD else None
        try:
            if beside is None:
                self._digest.update(view)
            if (begin, view.nbytes) not in self._there:
                self.write(file, view, begin)
        finally:
            if beside is not None:
                beside.result()  # also when the disk is full: it reads memory that is given back then

    def close(self) -> None:
        self._pool.shutdown()


def _tensor_data(plan: Plan, shard: ShardPlan, tensor: TensorPlan, ahead: LooksAhead, early: Early) -> Iterator[tuple[memoryview, dict[str, Any]]]:
    """The bytes to write for one tensor and its record (a generator, so that they are gone before the next is taken)."""
    target = shard.header.tensors[tensor.written]
    record: dict[str, Any] = {"name": tensor.written, "shape": list(target.shape), "dtype": target.dtype}
    if tensor.action == "copy":
        stored = plan.stored(tensor)
        if target.dtype != tensor.info.dtype and not tensor.stored:
            converted = stored.to(dtypes.torch_dtype(target.dtype))
            check_range(tensor.name, stored, converted)
            stored = converted
        yield tensor_bytes(stored), record | {"action": "copied", "reason": tensor.reason}
        return
    out, results = ahead.take(tensor, early)
    if target.dtype != tensor.info.dtype and not tensor.stored and not all(result.computed for result in results):
        check_range(tensor.name, plan.mirrored.tensor(tensor.name), out)
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
    yield tensor_bytes(plan.requantised.encode(tensor.name, out) if plan.requantised and tensor.stored else out), record


def check_range(name: str, read: Tensor, written: Tensor) -> None:
    """Raises NumericalError where a number became Inf because another dtype holds no number as large."""
    if not (read.is_floating_point() and written.is_floating_point()) or torch.finfo(written.dtype).max >= torch.finfo(read.dtype).max:
        return
    lost = 0
    for before, after in zip(*(torch.split(tensor.reshape(-1), _RANGE_PIECE) for tensor in (read, written)), strict=True):
        lost += int((torch.isfinite(before) & ~torch.isfinite(after)).sum())
    if lost:
        dtype = str(written.dtype).removeprefix("torch.")
        raise NumericalError(
            f"tensor {name} holds {lost:,} number(s) that {dtype} cannot hold (its largest is {torch.finfo(written.dtype).max:.4g}). "
            "Leave --dtype out, or take one with a larger range: bfloat16, float32."
        )


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
        # float64 weights are subtracted as such, as form_delta does: what float32 cannot hold may cancel.
        pieces = [part[start : start + step] for part in stored]
        values = [piece if piece.dtype == torch.float64 else piece.float() for piece in pieces]
        finite = [torch.isfinite((later - earlier).float()) for earlier, later in itertools.pairwise(values)]
        bad += int((~torch.stack(finite).all(0)).sum())
    return bad


def make_durable(file: DirectFile, path: Path) -> None:
    """Closes a written shard, at `path` while it is unfinished, once it survives a power cut. Raises WriteError."""
    try:
        with file:
            file.sync()
    except OSError as error:
        raise write_error(path, error) from error


def finish_sent_shard(plan: Plan, position: int, record: dict[str, Any], journal: Journal, sources: dict[SourceFile, str]) -> dict[str, Any]:
    """Records a shard that is in the plan's store. sources: as in `finish_shard`. Raises WriteError."""
    record |= {"sources": by_role(sources, plan.checkpoints), "sent": True}
    journal.record(plan.shards[position].file, record)
    return record


def finish_shard(
    plan: Plan, position: int, partial: Path, record: dict[str, Any], journal: Journal, sources: dict[SourceFile, str]
) -> dict[str, Any]:
    """Gives a durable shard its name, then records it. sources: sha256 of every file that it was made from. Raises WriteError."""
    shard = plan.shards[position]
    path = journal.out / shard.file
    record["sources"] = by_role(sources, plan.checkpoints)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    journal.record(shard.file, record)
    return record
