"""What was done: the manifest written beside the weights."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from lox_merge._version import __version__
from lox_merge.checkpoint.adapter_files import OverBase
from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.jobs.output_folder import MANIFEST
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.quantised import form_of, form_record

FORMAT = 1


def job_description(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Everything that decides the output's bytes, known before any tensor is read. Holds no path of the machine."""
    triplets = plan.triplets.record()
    return {
        "tool": tool(),
        "method": plan.edit.method,
        "device": device.type,
        "recipe": plan.recipe.to_json(),
        **({} if triplets is None else {"factors": triplets}),
        **{role: _described(checkpoint) for role, checkpoint in plan.checkpoints.items()},
    }


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    # config.json decides what the codes stand for.
    return checkpoint.source.identity() | form_of(checkpoint) | {"headers": header_hashes(checkpoint)}


def tool() -> dict[str, str]:
    """The versions that decide the output's bytes."""
    return {"name": "lox-merge", "version": __version__, "torch": torch.__version__}


def header_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """sha256 of each weight file's header, by file name."""
    return {file: hashlib.sha256(header.raw).hexdigest() for file, header in checkpoint.weight_headers.items()}


def output_identity(checkpoint: Checkpoint) -> dict[str, str]:
    """sha256 of the manifest of an output of this program, so that a result can be seen to be of that output; {} for other models. An
    adapter has one of its own, or none: that of the base behind it says nothing of it."""
    source = checkpoint.source
    if isinstance(source, OverBase):
        source = source.adapter
        source.fetch([name for name in source.names() if name == MANIFEST])
    if MANIFEST not in source.names():
        return {}
    return {"manifest_sha256": hashlib.sha256(source.path(MANIFEST).read_bytes()).hexdigest()}


def build_manifest(plan: Plan, job: dict[str, Any], records: list[dict[str, Any]], files: dict[str, str]) -> dict[str, Any]:
    """The manifest. It is a function of sources and recipe alone: no times, no host, no folder of the output.

    files: sha256 by name of everything in the output beside shards and manifest.
    """
    hashes: dict[str, dict[str, str]] = {role: {} for role in plan.checkpoints}
    for record in records:
        for role, found in record["sources"].items():
            hashes[role].update(found)
    sources = {
        role: checkpoint.source.identity()
        | {"files": {file: {"size": checkpoint.weight_headers[file].file_size, "sha256": digest} for file, digest in hashes[role].items()}}
        for role, checkpoint in plan.checkpoints.items()
    }
    tensors = [tensor for record in records for tensor in record["tensors"]]
    return {
        "format": FORMAT,
        "job": job,
        "sources": sources,
        "output": {"shards": [record["output"] for record in records], "files": files},
        "warnings": plan.warnings,
        **({"confirmed": plan.confirmed} if plan.confirmed else {}),
        **form_record(plan.checkpoints, plan.requantised, tensors),
        "tensors": tensors,
        "summary": plan.edit.summary(tensors),
    }
