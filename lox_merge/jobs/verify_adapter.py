"""Verification of an output in adapter form: its factors against those that base, aligned and recipe give."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lox_merge.checkpoint import dtypes
from lox_merge.checkpoint.adapter_config import CONFIG
from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.jobs.adapter_file import Triplets, stored_factors
from lox_merge.jobs.adapter_plan import AdapterPlan, Pair, lora_config, plan_adapter
from lox_merge.jobs.atomic import json_bytes
from lox_merge.jobs.engine import Progress
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.summary import summarise
from lox_merge.jobs.work import form_delta

# Beside the tolerance of the SVD: rounding of the stored factors, twice, on another machine.
_ROUNDINGS = 8


def check_structure(output: Checkpoint, manifest: Mapping[str, Any]) -> list[str]:
    """Factors of the file against the tensors of the manifest that name them, and the summary against its entries."""
    problems = []
    named = {name for tensor in manifest["tensors"] for name in tensor.get("factors", ())}
    problems += [f"tensor {name} is in {output.home[name]}, but no tensor of the manifest names it" for name in output.names if name not in named]
    problems += [f"tensor {name} of the manifest is in no file" for name in sorted(named) if name not in output]
    code = dtypes.OUTPUT_CODES.get(manifest["adapter"]["dtype"])
    problems += [f"tensor {name} is {output.info(name).describe()}, not {code}" for name in output.names if output.info(name).dtype != code]
    if asdict(summarise(manifest["tensors"])) != manifest["summary"]:
        problems.append("the manifest was edited: its summary does not follow from its tensors")
    return problems


def recompute(
    output: Checkpoint, plan: Plan, manifest: Mapping[str, Any], sample: int | None, seed: int, device: torch.device, progress: Progress | None
) -> tuple[int, list[str]]:
    """Factors made again from the sources: how many tensors, and what differs."""
    made = plan_adapter(plan)
    recorded = {tensor["name"]: tensor for tensor in manifest["tensors"]}
    problems = [f"tensor {tensor.name} of aligned is not in the manifest" for tensor in plan.tensors if tensor.name not in recorded]
    if problems:
        return 0, problems
    ranks = {(tensor["name"], matrix["part"]): matrix["rank"] for tensor in recorded.values() for matrix in tensor.get("matrices", ())}
    if not _same_config(output.json(CONFIG) or {}, _config(made, ranks, manifest)):
        problems.append(f"{CONFIG} is not what belongs to these factors")
    pairs = made.pairs
    if sample is not None and sample < len(pairs):
        pairs = random.Random(seed).sample(pairs, sample)
    count = 0
    for pair in pairs:
        problems += _compare(pair, made, output, recorded, ranks, device)
        count += len({source.tensor.name for source in pair.sources})
        if progress:
            progress.advance(sum(source.tensor.info.bytes for source in pair.sources))
    return count, problems


def _config(made: AdapterPlan, ranks: Mapping[tuple[str, str], int], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as it would be written now, with the names of the sources as they were given then."""
    source = manifest["sources"]["aligned"]
    pairs = [(pair, pair.rank(ranks)) for pair in made.pairs]
    values: dict[str, Any] = json.loads(json_bytes(lora_config(made.plan.aligned.config, (source["name"], source.get("commit")), pairs)))
    return values


def _same_config(written: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Equal but for what another version of peft does not have: such settings are unset, or they would change the adapter."""
    shared = (written.keys() & expected.keys()) - {"peft_version"}
    unknown = [value for key, value in written.items() if key not in expected]
    return {"peft_type", "r", "lora_alpha", "target_modules"} <= shared and all(written[key] == expected[key] for key in shared) and not any(unknown)


def _compare(
    pair: Pair, made: AdapterPlan, output: Checkpoint, recorded: Mapping[str, Any], ranks: Mapping[tuple[str, str], int], device: torch.device
) -> list[str]:
    plan = made.plan
    found: dict[tuple[str, str], Triplets] = {}
    for source in pair.sources:
        stored = plan.base.tensor(source.tensor.base_name), plan.aligned.tensor(source.tensor.name)
        base, aligned = (source.view.select(tensor).to(device) for tensor in stored)
        delta, norm, bad = form_delta(base, aligned)
        if bad or norm == 0:
            rows, columns = source.view.shape
            found[source.key] = torch.zeros(rows, 0), torch.zeros(0, dtype=torch.float64), torch.zeros(columns, 0)
            continue
        subspace = plan.triplets.subspace(source.tensor, source.view, delta, base, aligned)
        found[source.key] = subspace.left.cpu(), subspace.singular_values, subspace.right.cpu()
    now = {key: int(values.numel()) for key, (_, values, _) in found.items()}
    name = ", ".join(pair.names)
    if any(now[source.key] != ranks.get(source.key, 0) for source in pair.sources):
        return [f"the manifest's ranks of {pair.target} are not those of its deltas"]
    rank = pair.rank(now)
    if rank == 0:
        return [f"{name}: the delta is zero, but the adapter has factors for it"] if pair.names[0] in output else []
    if any(part not in output or output.info(part).shape != shape for part, shape in zip(pair.names, pair.shapes(rank), strict=True)):
        return [f"{name} are not there, or of another shape than rank {rank} gives"]
    dtype = dtypes.torch_dtype(dtypes.OUTPUT_CODES[made.dtype])
    expected = stored_factors(pair, rank, lambda source: found[source.key], dtype)
    written = tuple(output.tensor(part) for part in pair.names)
    problems = []
    difference = _difference(pair, rank, written, expected)
    if not difference <= 2 * plan.recipe.tolerance + _ROUNDINGS * torch.finfo(dtype).eps:
        problems.append(f"{name} are not what the recipe gives: the update differs by {difference:.2g} of its norm")
    problems += _figures(pair, found, recorded)
    return problems


def _difference(pair: Pair, rank: int, written: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """||B·A - B'·A'||_F/||B'·A'||_F, largest over experts. Of the products: pairs of vectors may have changed their signs."""
    worst = 0.0
    stacked = max(1, pair.experts)
    for expert in range(stacked):
        parts = []
        for first, second in (written, expected):
            inside = first.reshape(stacked, rank, -1)[expert].double()
            parts.append((inside, second.reshape(second.shape[0], rank, stacked)[:, :, expert].double()))
        (one, outer_one), (other, outer_other) = parts
        # The product of stacked factors is the difference; its norm comes from small Gram matrices, or from QR where they cancel.
        core = torch.linalg.qr(torch.cat([outer_one, -outer_other], 1)).R @ torch.linalg.qr(torch.cat([one, other]).T).R.T
        size = float((torch.linalg.qr(outer_other).R @ torch.linalg.qr(other.T).R.T).norm())
        distance = float(core.norm())
        worst = max(worst, distance / size if size else (0.0 if distance == 0 else float("inf")))
    return worst


def _figures(pair: Pair, found: Mapping[tuple[str, str], Triplets], recorded: Mapping[str, Any]) -> list[str]:
    problems = []
    for source in pair.sources:
        matrices = {matrix["part"]: matrix for matrix in recorded[source.tensor.name].get("matrices", ())}
        values = matrices[source.view.label]["singular_values"] if source.view.label in matrices else []
        if not torch.allclose(torch.tensor(values, dtype=torch.float64), found[source.key][1], rtol=5e-3):
            problems.append(f"the manifest's figures of tensor {source.tensor.name} are not those of its matrices")
    return problems
