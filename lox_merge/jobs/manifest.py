"""What was done: the manifest written beside the weights, and the summary that people read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lox_merge._version import __version__
from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.jobs.plan import MANIFEST, Plan

FORMAT = 1


def job_description(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Everything that decides the output's bytes, known before any tensor is read. Holds no path of the machine."""
    triplets = plan.triplets.record()
    return {
        "tool": {"name": "lox-merge", "version": __version__, "torch": torch.__version__},
        "method": "lox",
        "device": device.type,
        "recipe": plan.recipe.to_json(),
        **({} if triplets is None else {"factors": triplets}),
        "base": plan.base.source.identity() | {"headers": header_hashes(plan.base)},
        "aligned": plan.aligned.source.identity() | {"headers": header_hashes(plan.aligned)},
    }


def header_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """sha256 of each weight file's header, by file name."""
    return {file: hashlib.sha256(header.raw).hexdigest() for file, header in checkpoint.headers.items()}


def output_identity(checkpoint: Checkpoint) -> dict[str, str]:
    """sha256 of the manifest of an output of this program, so that a result can be seen to be of that output; {} for other models."""
    if MANIFEST not in checkpoint.source.names():
        return {}
    return {"manifest_sha256": hashlib.sha256(checkpoint.source.path(MANIFEST).read_bytes()).hexdigest()}


def build_manifest(plan: Plan, job: dict[str, Any], records: list[dict[str, Any]], files: dict[str, str]) -> dict[str, Any]:
    """The manifest. It is a function of sources and recipe alone: no times, no host, no folder of the output.

    files: sha256 by name of everything in the output beside shards and manifest.
    """
    hashes: dict[str, dict[str, str]] = {"base": {}, "aligned": {}}
    for record in records:
        for role, found in record["sources"].items():
            hashes[role].update(found)
    sources = {
        role: checkpoint.source.identity()
        | {"files": {file: {"size": checkpoint.headers[file].file_size, "sha256": digest} for file, digest in hashes[role].items()}}
        for role, checkpoint in (("base", plan.base), ("aligned", plan.aligned))
    }
    manifest = {
        "format": FORMAT,
        "job": job,
        "sources": sources,
        "output": {"shards": [record["output"] for record in records], "files": files},
        "warnings": plan.warnings,
        "tensors": [tensor for record in records for tensor in record["tensors"]],
    }
    manifest["summary"] = asdict(summarise(manifest))
    return manifest


@dataclass(frozen=True)
class Summary:
    """Figures over all edited matrices. None where there is nothing to average.

    mean_r_align: mean of R_align per matrix; energy_r_align: √(Σ‖Proj(Δ)‖²/Σ‖Δ‖²). realised_gain: Σ⟨R,T⟩/Σ‖T‖² over the
    whole model; smallest_gain: the matrix that lost most. largest_angle_bound: worst certificate (radians' sine).
    """

    edited_tensors: int
    edited_matrices: int
    copied_tensors: int
    zero_deltas: int
    mean_rank: float | None
    mean_r_align: float | None
    energy_r_align: float | None
    realised_gain: float | None
    smallest_gain: float | None
    smallest_gain_tensor: str | None
    largest_angle_bound: float | None
    largest_angle_tensor: str | None
    ambiguous_matrices: int


def _matrices(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for tensor in manifest["tensors"]:
        for matrix in tensor.get("matrices", ()):
            if matrix["realised"] is not None:
                yield tensor["name"] + matrix["part"], matrix


def summarise(manifest: dict[str, Any]) -> Summary:
    tensors = manifest["tensors"]
    matrices = list(_matrices(manifest))
    ratios = [matrix["r_align"] for _, matrix in matrices if matrix["r_align"] is not None]
    ranks = [min(matrix["shape"]) if matrix["rank"] == "full" else matrix["rank"] for _, matrix in matrices]
    total = math.fsum(matrix["delta_norm"] ** 2 for _, matrix in matrices)
    kept = math.fsum((matrix["r_align"] or 0.0) ** 2 * matrix["delta_norm"] ** 2 for _, matrix in matrices)
    realised = [(name, matrix["realised"]) for name, matrix in matrices if matrix["realised"]["gain"] is not None]
    intended = math.fsum(entry["intended_norm"] ** 2 for _, entry in realised)
    gained = math.fsum(entry["gain"] * entry["intended_norm"] ** 2 for _, entry in realised)
    worst_gain = min(realised, key=lambda pair: pair[1]["gain"], default=None)
    bounds = [
        (name, matrix["certificate"]["angle_bound"])
        for name, matrix in matrices
        if matrix["certificate"] and matrix["certificate"]["angle_bound"] is not None
    ]
    worst_angle = max(bounds, key=lambda pair: pair[1], default=None)
    return Summary(
        edited_tensors=sum(tensor["action"] == "edited" for tensor in tensors),
        edited_matrices=len(matrices),
        copied_tensors=sum(tensor["action"] == "copied" for tensor in tensors),
        zero_deltas=sum(tensor.get("reason") == "the delta is zero" for tensor in tensors),
        mean_rank=sum(ranks) / len(ranks) if ranks else None,
        mean_r_align=math.fsum(ratios) / len(ratios) if ratios else None,
        energy_r_align=math.sqrt(kept / total) if total else None,
        realised_gain=gained / intended if intended else None,
        smallest_gain=worst_gain[1]["gain"] if worst_gain else None,
        smallest_gain_tensor=worst_gain[0] if worst_gain else None,
        largest_angle_bound=worst_angle[1] if worst_angle else None,
        largest_angle_tensor=worst_angle[0] if worst_angle else None,
        ambiguous_matrices=sum(bool(matrix["certificate"] and matrix["certificate"]["ambiguous"]) for _, matrix in matrices),
    )
