"""Hardening as a LoRA adapter: the update alone, in megabytes, to be put on the aligned model."""

from __future__ import annotations

import hashlib
import math
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lox_merge.checkpoint.adapter_config import CONFIG
from lox_merge.errors import Interrupted, LoxMergeWarning, NumericalError
from lox_merge.jobs.adapter_file import Triplets, Written, write_factors
from lox_merge.jobs.adapter_plan import AdapterPlan, Source
from lox_merge.jobs.atomic import json_bytes, sync_folder, write_atomically
from lox_merge.jobs.beforehand import check_folder, resolve_device
from lox_merge.jobs.engine import Progress
from lox_merge.jobs.execute import Silent, abandoned_where_not_finite, already_done
from lox_merge.jobs.harden import HardenResult, check_some_delta
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.layout import MatrixView
from lox_merge.jobs.manifest import build_manifest, job_description
from lox_merge.jobs.noise import grid_of
from lox_merge.jobs.output_folder import MANIFEST, check_room
from lox_merge.jobs.pieces import piece_name, write_pieces
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.select import TensorPlan
from lox_merge.maths.edits import apply_update, lox_update
from lox_merge.maths.subspace import Subspace

FORM = "adapter"
# The terms that aligned's card links to: they hold for what is made from it.
_LICENCE = re.compile(r"(licen[cs]e|notice|copying|use_policy|acceptable_use_policy)([-_.][^/]*)?", re.IGNORECASE)


def execute_adapter(made: AdapterPlan, *, device: str = "auto", overwrite: bool = False, progress: Progress | None = None) -> HardenResult:
    """Writes adapter_model.safetensors, adapter_config.json, aligned's licence and the manifest to the plan's folder.

    B = alpha · U_k S_k, A = V_kᵀ on every module, scale 1, on top of the aligned model. Called again after an interruption it goes on
    with what is finished. Raises RequestError before anything is written, LoxMergeError afterwards.
    """
    started = time.perf_counter()
    plan = made.plan
    target, job, journal = check_adapter_job(made, device=device, overwrite=overwrite)
    if not overwrite:
        done = already_done(plan, journal)
        if done is not None:
            remove_pieces(plan)  # stopped between manifest and clean-up
            return HardenResult(plan.out, done, time.perf_counter() - started, len(plan.shards), 0, 0)
    check_room_for(made)
    plan.fetch()
    check_some_delta(plan)
    for text in plan.warnings:
        warnings.warn(text, LoxMergeWarning, stacklevel=3)
    try:
        with journal.locked():
            if overwrite:
                journal.clear()
            journal.begin(job)
            resumed = sum((plan.out / piece_name(shard)).is_file() for shard in plan.shards)
            with abandoned_where_not_finite(journal, [piece_name(shard) for shard in plan.shards]):
                records = write_pieces(plan, journal, target, progress or Silent(), examine=partial(_nearest_rounding, plan))
            pieces = Pieces(plan, records, plan.out)
            config = json_bytes(made.config(pieces.ranks))
            weights, outcome = write_factors(made, pieces.ranks, pieces.read, journal)
            texts = {name: plan.aligned.source.path(name).read_bytes() for name in licence_files(plan.side_files)} | {CONFIG: config}
            manifest = _manifest(made, job, pieces, weights, {name: hashlib.sha256(data).hexdigest() for name, data in texts.items()}, outcome)
            whole = json_bytes(manifest)
            # The configuration is the last but the manifest: without it PEFT loads nothing from a folder that could not be finished.
            for name, data in texts.items():
                write_atomically(plan.out / name, data, journal.folder)
            write_atomically(plan.out / MANIFEST, whole, journal.folder)
            sync_folder(plan.out)
            remove_pieces(plan)
            journal.end()
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted. Finished pieces are kept in {plan.out}; run the same command again to go on, or pass --overwrite to start anew."
        ) from None
    if manifest["adapter"]["left_out_share"]:
        warnings.warn(left_out_text(manifest), LoxMergeWarning, stacklevel=2)
    return HardenResult(plan.out, manifest, time.perf_counter() - started, resumed, plan.bytes_read, weights["size"])


def check_adapter_job(made: AdapterPlan, *, device: str, overwrite: bool) -> tuple[torch.device, dict[str, Any], Journal]:
    """What is refused before weights are read. Returns the device, the job and the state of the output."""
    target = resolve_device(device)
    job = adapter_job(made, target)
    return target, job, check_folder(made.plan, job, overwrite=overwrite)


def check_room_for(made: AdapterPlan) -> None:
    # Vectors of all edited tensors while it runs, and the adapter beside them; a disk that fills up later loses nothing.
    check_room(made.plan.out, 2 * (made.largest_bytes or 0))


def remove_pieces(plan: Plan) -> None:
    for shard in plan.shards:
        (plan.out / piece_name(shard)).unlink(missing_ok=True)


def licence_files(names: Iterable[str]) -> list[str]:
    """Those of aligned's files that go with an adapter too."""
    return [name for name in names if _LICENCE.fullmatch(name)]


def adapter_job(made: AdapterPlan, device: torch.device) -> dict[str, Any]:
    """What decides the adapter's bytes; also which version of peft writes its configuration."""
    import peft

    job = job_description(made.plan, device)
    return job | {"form": FORM, "tool": job["tool"] | {"peft": peft.__version__}}


def left_out_text(manifest: dict[str, Any]) -> str:
    """The warning of an adapter that is not the whole edit."""
    found = manifest["adapter"]
    names = [tensor["name"] for tensor in manifest["tensors"] if "left_out" in tensor]
    reasons = dict.fromkeys(tensor["left_out"]["reason"] for tensor in manifest["tensors"] if "left_out" in tensor)
    return (
        f"the adapter leaves out {len(names)} edited tensor(s) with {found['left_out_share']:.1%} of the edit's squared norm: "
        f"{', '.join(names[:4])}{' …' if len(names) > 4 else ''} ({'; '.join(reasons)}). A whole model (without --as-adapter) has all of it."
    )


def _nearest_rounding(plan: Plan, aligned: Tensor, tensor: TensorPlan, view: MatrixView, subspace: Subspace) -> dict[str, Any]:
    """Gain of the same edit written into the stored form by rounding to nearest: what an adapter saves; null for float32, and where
    that form cannot hold the edit (which is nothing against the adapter)."""
    grid = grid_of(plan.aligned, tensor.name, view)
    if subspace.rank == 0 or (grid is None and aligned.dtype in (torch.float32, torch.float64)):
        return {"nearest_gain": None}
    try:
        _, kept = apply_update(aligned, lox_update(subspace, tensor.alpha), grid=None if grid is None else grid.to(aligned.device))
    except NumericalError:
        return {"nearest_gain": None}
    return {"nearest_gain": kept.gain}


@dataclass
class Pieces:
    """The finished pieces of a run: records by matrix, and vectors read from their files."""

    plan: Plan
    records: list[dict[str, Any]]
    folder: Path

    def __post_init__(self) -> None:
        self.matrices: dict[tuple[str, str], dict[str, Any]] = {}
        self._places: dict[tuple[str, str], tuple[Path, int]] = {}
        for record in self.records:
            path, offset = self.folder / record["output"]["file"], 0
            for matrix in record["matrices"]:
                key = (matrix["name"], matrix["part"])
                self.matrices[key], self._places[key] = matrix, (path, offset)
                offset += 4 * matrix["rank"] * sum(matrix["shape"])
        self.skipped = [name for record in self.records for name in record["skipped"]]
        self.ranks = {key: int(matrix["rank"]) for key, matrix in self.matrices.items()}

    def read(self, source: Source) -> Triplets:
        rows, columns = source.view.shape
        matrix = self.matrices.get(source.key)
        if matrix is None or matrix["rank"] == 0:
            return torch.zeros(rows, 0), torch.zeros(0, dtype=torch.float64), torch.zeros(columns, 0)
        path, offset = self._places[source.key]
        rank = matrix["rank"]
        with path.open("rb") as file:
            file.seek(offset)
            data = torch.frombuffer(bytearray(file.read(4 * rank * (rows + columns))), dtype=torch.float32)
        left, right = data[: rank * rows].view(rows, rank), data[rank * rows :].view(columns, rank)
        return left, torch.tensor(matrix["values"], dtype=torch.float64), right


def _manifest(
    made: AdapterPlan, job: dict[str, Any], pieces: Pieces, weights: dict[str, Any], files: dict[str, str], outcome: dict[Any, Written]
) -> dict[str, Any]:
    """As for a whole model, with the same entry per tensor of aligned, and `adapter` for what is particular to this form."""
    by_tensor = {source.tensor.name: pair for pair in made.pairs for source in pair.sources}
    entries = [dict(_entries(made, tensor, pieces, outcome, by_tensor)) for tensor in made.plan.tensors]
    records = [
        {"output": weights, "sources": record["sources"], "tensors": entries if not position else []}
        for position, record in enumerate(pieces.records)
    ]
    manifest = build_manifest(made.plan, job, records, files)
    manifest["output"] = {"form": FORM, "shards": [weights], "files": files}
    edited = [matrix for entry in entries for matrix in entry.get("matrices", ())]
    left = math.fsum(entry["left_out"]["intended_norm"] ** 2 for entry in entries if "left_out" in entry)
    kept = math.fsum(matrix["realised"]["intended_norm"] ** 2 for matrix in edited)
    nearest = [(matrix["nearest_gain"], matrix["realised"]["intended_norm"] ** 2) for matrix in edited if matrix["nearest_gain"] is not None]
    weight = math.fsum(square for _, square in nearest)
    manifest["adapter"] = {
        "dtype": made.dtype,
        "parameters": sum(pair.rank(pieces.ranks) * max(1, pair.experts) * sum(pair.shape) for pair in made.pairs),
        "modules": sum(pair.rank(pieces.ranks) > 0 for pair in made.pairs),
        "largest_rank": max(pair.rank(pieces.ranks) for pair in made.pairs),
        "bytes": weights["size"],
        "model_bytes": made.plan.aligned.bytes,
        "left_out": dict(made.left_out),
        "left_out_share": left / (left + kept) if left + kept else None,
        "nearest_gain": math.fsum(gain * square for gain, square in nearest) / weight if weight else None,
    }
    return manifest


def _entries(made: AdapterPlan, tensor: TensorPlan, pieces: Pieces, outcome: dict[Any, Written], pairs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """One tensor of aligned: edited with figures per matrix, or as it was and why."""
    info = tensor.info
    yield from {"name": tensor.name, "shape": list(info.shape), "dtype": info.dtype}.items()
    if tensor.action == "copy":
        yield from {"action": "copied", "reason": tensor.reason}.items()
        return
    found = [(view, pieces.matrices.get((tensor.name, view.label))) for view in tensor.views]
    skipped = [view.label for view, matrix in found if matrix is None]
    if skipped:
        yield "non_finite", {"parts": skipped}
    if not any(matrix is not None and matrix["rank"] for _, matrix in found):
        reason = "NaN or Inf in the delta" if skipped else "the delta is zero"
        yield from {"action": "copied", "reason": reason}.items()
        return
    if tensor.name in made.left_out:
        norm = tensor.alpha * math.sqrt(math.fsum(value**2 for _, matrix in found if matrix for value in matrix["values"]))
        reason = made.left_out[tensor.name]
        yield from {"action": "copied", "reason": f"left out of the adapter: {reason}"}.items()
        yield "left_out", {"reason": reason, "intended_norm": norm}
        return
    yield from {"action": "edited", "rank_rule": str(tensor.rank), "alpha": tensor.alpha, "factors": list(pairs[tensor.name].names)}.items()
    yield "matrices", [matrix_record(matrix, outcome[tensor.name, view.label]) for view, matrix in found if matrix is not None]


def matrix_record(matrix: dict[str, Any], written: Written) -> dict[str, Any]:
    """The manifest's record of one matrix, from that of its piece."""
    norm, values = matrix["norm"], matrix["values"]
    record = {"part": matrix["part"], "shape": matrix["shape"], "delta_norm": norm, "rank": matrix["rank"], "singular_values": values}
    if matrix["rank"] == 0:
        return record | {"r_align": None, "certificate": None, "realised": None, "nearest_gain": None}
    ratio = min(1.0, math.sqrt(math.fsum(value**2 for value in values)) / norm)
    return record | {"r_align": ratio, "certificate": matrix["certificate"], "realised": asdict(written), "nearest_gain": matrix["nearest_gain"]}
