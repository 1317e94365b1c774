"""Pieces of a factors file: one per shard of the aligned checkpoint, so that an interruption loses at most one of them.

A piece holds the vectors of its shard's matrices, raw, in their final order; singular values and certificates are in its
record. The file itself is streamed together from pieces once all are there, and gets its name last.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lox_merge.checkpoint.safetensors_format import build_header
from lox_merge.checkpoint.weights import tensor_bytes
from lox_merge.errors import NonFiniteDeltaError, NumericalError
from lox_merge.jobs.atomic import json_bytes, new_file, sync_folder, write_error
from lox_merge.jobs.device_memory import on_cpu_where_too_large
from lox_merge.jobs.engine import Progress, by_role, count_non_finite, first_stamp, source_path, typical_cost
from lox_merge.jobs.factors import METADATA_KEY
from lox_merge.jobs.hashing import SourceHasher
from lox_merge.jobs.in_flight import InFlight, in_order
from lox_merge.jobs.journal import Journal, flat_name
from lox_merge.jobs.layout import MatrixView
from lox_merge.jobs.noise import PairNoise, RoundingNoise
from lox_merge.jobs.plan import Plan, ShardPlan
from lox_merge.jobs.select import TensorPlan
from lox_merge.jobs.triplets import TripletSource
from lox_merge.jobs.work import IN_FLIGHT_BYTES, Crew, CrewSize, certificate_record, form_delta
from lox_merge.maths.subspace import Subspace


@dataclass(frozen=True)
class _Decomposed:
    """One matrix: its triplets, or how many NaN and Inf its delta holds (then nothing else)."""

    subspace: Subspace | None
    noise_edge: float = 0.0
    bad: int = 0
    examined: dict[str, Any] = field(default_factory=dict)


# More to know of a matrix while it is in memory: plain values for its record. (aligned, tensor, view, triplets)
Examine = Callable[[Tensor, TensorPlan, MatrixView, Subspace], dict[str, Any]]


def write_pieces(plan: Plan, journal: Journal, device: torch.device, progress: Progress, examine: Examine = lambda *_: {}) -> list[dict[str, Any]]:
    """Decomposes every shard that is not finished yet. Returns one record per shard with edited tensors, in order.

    Raises NonFiniteDeltaError, WriteError, SourceChangedError, NumericalError; finished pieces stay.
    """
    shards = [shard for shard in plan.shards if _edited(shard)]
    hasher = SourceHasher([shard.sources(plan.checkpoints) for shard in shards], partial(source_path, plan), partial(first_stamp, plan))
    records: list[dict[str, Any]] = []
    crew = Crew(device, CrewSize.of(device, typical_cost(plan)))
    try:
        with crew.threads():
            for position, shard in enumerate(shards):
                record = journal.finished(piece_name(shard))
                if record is None:
                    hasher.start_shard(position)
                    record = _write_piece(plan, shard, journal, crew, progress, examine)
                    record["sources"] = by_role(hasher.hashes(position), plan.checkpoints)
                    journal.partial(piece_name(shard)).replace(journal.out / piece_name(shard))
                    journal.record(piece_name(shard), record)
                else:
                    journal.check_sources(record, by_role(hasher.hashes(position), plan.checkpoints))
                    progress.advance(_bytes(shard))
                records.append(record)
    finally:
        crew.close()
        hasher.close()
        plan.close()
    return records


def piece_name(shard: ShardPlan) -> str:
    return flat_name(shard.file) + ".piece"


def _edited(shard: ShardPlan) -> list[TensorPlan]:
    return [tensor for tensor in shard.tensors if tensor.action == "edit"]


def _bytes(shard: ShardPlan) -> int:
    return sum(tensor.info.bytes for tensor in _edited(shard))


def _write_piece(plan: Plan, shard: ShardPlan, journal: Journal, crew: Crew, progress: Progress, examine: Examine) -> dict[str, Any]:
    path = journal.partial(piece_name(shard))
    digest, size = hashlib.sha256(), 0
    matrices: list[dict[str, Any]] = []
    skipped: list[str] = []
    with new_file(path) as file:
        for tensor, view, result in _in_order(plan, shard, crew, examine):
            if result.subspace is None:
                if not plan.recipe.skip_non_finite:
                    raise NonFiniteDeltaError(count_non_finite(plan))
                skipped.append(tensor.name + view.label)
            else:
                for vectors in (result.subspace.left, result.subspace.right):
                    data = tensor_bytes(vectors.cpu()) if vectors.numel() else memoryview(b"")
                    file.write(data)
                    digest.update(data)
                    size += data.nbytes
                matrices.append(_record(tensor, view, result.subspace, result.noise_edge) | result.examined)
            progress.advance(tensor.info.bytes // len(tensor.views))
    output = {"file": piece_name(shard), "size": size, "sha256": digest.hexdigest()}
    return {"output": output, "sources": {}, "matrices": matrices, "skipped": skipped}


def _record(tensor: TensorPlan, view: MatrixView, subspace: Subspace, noise_edge: float) -> dict[str, Any]:
    assert tensor.rank is not None
    return {
        "name": tensor.name,
        "part": view.label,
        "shape": list(view.shape),
        "rank": subspace.rank,
        "norm": subspace.norm,
        "noise_edge": noise_edge,
        "complete": (tensor.rank.kind == "fixed" and subspace.rank < tensor.rank.value) or subspace.rank == min(view.shape),
        "certificate": certificate_record(subspace.certificate),
        "values": subspace.singular_values.tolist(),
    }


def _in_order(plan: Plan, shard: ShardPlan, crew: Crew, examine: Examine) -> Iterator[tuple[TensorPlan, MatrixView, _Decomposed]]:
    """Results in the order of the file; matrices are decomposed ahead while the memory budget allows."""
    waiting = deque((tensor, view) for tensor in _edited(shard) for view in tensor.views)
    started: deque[tuple[tuple[TensorPlan, MatrixView], Future[_Decomposed]]] = deque()
    in_flight = InFlight(IN_FLIGHT_BYTES + plan.largest_matrix_bytes)

    def begin_more() -> None:
        while waiting:
            tensor, view = waiting[0]
            cost = plan.working_memory(tensor, view)
            if started and cost > in_flight.room:
                return
            waiting.popleft()
            base, aligned = view.select(plan.base.tensor(tensor.base_name)), view.select(plan.aligned.tensor(tensor.name))
            noise = PairNoise(plan.base, plan.aligned).of(tensor, view)
            future = crew.submit(_decompose, base, aligned, noise, tensor, view, plan.triplets, examine, crew.device)
            in_flight.watch(future, cost)
            started.append(((tensor, view), future))

    for (tensor, view), result in in_order(started, in_flight, begin_more):
        yield tensor, view, result


def _decompose(
    base: Tensor,
    aligned: Tensor,
    noise: RoundingNoise,
    tensor: TensorPlan,
    view: MatrixView,
    triplets: TripletSource,
    examine: Examine,
    device: torch.device,
) -> _Decomposed:
    def decompose(device: torch.device) -> _Decomposed:
        return _triplets(base.to(device), aligned.to(device), noise, tensor, view, triplets, examine)

    try:
        return on_cpu_where_too_large(decompose, device, f"{tensor.name}{view.label} ({list(view.shape)})", "decomposed")
    except NumericalError as error:
        raise NumericalError(f"tensor {tensor.name}{view.label}: {error}.") from error


def _triplets(
    base: Tensor, aligned: Tensor, noise: RoundingNoise, tensor: TensorPlan, view: MatrixView, triplets: TripletSource, examine: Examine
) -> _Decomposed:
    delta, _, bad = form_delta(base, aligned)
    if bad:
        return _Decomposed(None, bad=bad)
    subspace = triplets.subspace(tensor, view, delta, base, aligned)
    return _Decomposed(subspace, noise.edge(base, aligned, delta), examined=examine(aligned, tensor, view, subspace))


def assemble(path: Path, records: list[dict[str, Any]], document: dict[str, Any], journal: Journal) -> None:
    """Streams all pieces into one safetensors file and gives it its name. Raises WriteError."""
    matrices = [matrix for record in records for matrix in record["matrices"]]
    described = [{key: value for key, value in matrix.items() if key != "values"} for matrix in matrices]
    # All float64 first: behind an odd number of float32 they would be out of alignment.
    entries: list[tuple[str, str, tuple[int, ...]]] = [(_key(matrix, "values"), "F64", (matrix["rank"],)) for matrix in matrices]
    for matrix in matrices:
        entries += [(_key(matrix, side), "F32", (length, matrix["rank"])) for side, length in zip(("left", "right"), matrix["shape"], strict=True)]
    text = json_bytes(document | {"matrices": described}).decode()
    header = build_header(entries, {METADATA_KEY: text})
    partial = journal.partial(path.name)
    with new_file(partial, path) as file:
        file.write(header.raw)
        for matrix in matrices:
            if matrix["rank"]:
                file.write(tensor_bytes(torch.tensor(matrix["values"], dtype=torch.float64)))
        for record in records:
            with (journal.out / record["output"]["file"]).open("rb") as piece:
                shutil.copyfileobj(piece, file, 2**22)
    try:
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error


def _key(matrix: dict[str, Any], what: str) -> str:
    return f"{matrix['name']}{matrix['part']}.{what}"
