"""Is what a device computes right? Against a full SVD in float64, against itself, and whole jobs against the CPU's."""

from __future__ import annotations

import hashlib
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gpu_stages import pair
from safetensors.torch import load_file
from synthetic import make_pair

from lox_merge import Recipe, harden
from lox_merge.jobs.batched_ahead import BatchedAhead
from lox_merge.jobs.execute import Silent
from lox_merge.jobs.executors.run import run
from lox_merge.jobs.executors.serial import Serial
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.manifest import job_description
from lox_merge.jobs.pipeline import Pipeline
from lox_merge.maths.batched_lanczos import batched_lanczos
from lox_merge.maths.batched_spectral import batched_truncated_svd
from lox_merge.maths.precision import frobenius_norm
from lox_merge.maths.rank import RankRule


def check_certificates(device: torch.device, rank: int) -> dict[str, Any]:
    """Errors of a batch against a full SVD in float64 on the CPU, beside what the certificates allow; and the same bits twice, and with
    other threads beside."""
    shapes = [(384, 640), (640, 384)]
    worst, allowed, same, waits = 0.0, 0.0, True, 0
    for shape in shapes:
        pairs = [pair(shape, device, seed) for seed in range(4)]
        deltas = torch.stack([aligned.float() - base.float() for base, aligned in pairs])
        norms = [frobenius_norm(delta) for delta in deltas]
        there = deltas.to(device)

        def decompose(matrices: torch.Tensor = there, sizes: list[float] = norms) -> Any:
            return batched_truncated_svd(matrices, RankRule("fixed", rank), norms=sizes)

        found, again = decompose(), decompose()
        with ThreadPoolExecutor(3) as pool:
            beside = [future.result() for future in [pool.submit(decompose) for _ in range(3)]]
        for other in (again, *beside):
            same &= all(torch.equal(one.left, two.left) and torch.equal(one.right, two.right) for one, two in zip(found, other, strict=True))
        for delta, subspace in zip(deltas, found, strict=True):
            left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
            exact = (left[:, :rank] * values[:rank]) @ right[:rank]
            size = float(exact.norm())
            worst = max(worst, float((subspace.low_rank().cpu().double() - exact).norm()) / size)
            bound = subspace.certificate.projection_error_bound
            allowed = max(allowed, math.inf if bound is None else bound / size)
        waits += hidden_waits(there, rank, device)
    return {"worst_error": worst, "certified": allowed, "within": worst <= 1.05 * allowed + 1e-5, "same_bits": same, "hidden_waits": waits}


def hidden_waits(matrices: torch.Tensor, rank: int, device: torch.device) -> int:
    """How often torch says that the host waited for the device within an SVD of a batch, beside the stop tests."""
    if device.type != "cuda":
        return 0
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            batched_lanczos(matrices, rank, chosen=range(len(matrices)), tolerance=1e-3, seed=0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Not any mention of it: the first to ask for these warnings in a process is told that they are a prototype.
    return sum("called a synchronizing" in str(warning.message) for warning in heard)


def check_job(folder: Path, size: str, device: torch.device, rank: int) -> dict[str, Any]:
    """A whole `harden` on the device, twice, against one on the CPU: the same bytes, and edits that differ by what certificates allow."""
    base, aligned = make_pair(folder / "pair", size)
    recipe = Recipe(rank=rank, dtype="float32")  # what the SVDs differ by is seen, not how bf16 rounds it
    usual = harden(base, aligned, folder / "cpu", recipe=recipe, device="cpu")
    for name in ("first", "second"):
        _harden(base, aligned, folder / name, recipe, device)
    first, second, expected = (_read(folder / name) for name in ("first", "second", "cpu"))
    bounds = {
        tensor["name"]: [matrix["certificate"]["projection_error_bound"] for matrix in tensor["matrices"]]
        for tensor in usual.manifest["tensors"]
        if tensor["action"] == "edited"
    }
    worst = 0.0
    for name, given in bounds.items():
        if any(bound is None for bound in given):
            continue
        # Both sides are as close to the truth as their certificates say, and these are alike.
        room = 2 * 1.25 * math.sqrt(sum(bound**2 for bound in given)) + 1e-6 * float(expected[name].double().norm())
        worst = max(worst, float((first[name].double() - expected[name].double()).norm()) / room)
    return {
        "size": size,
        "same_bytes": _hashes(folder / "first") == _hashes(folder / "second") and first.keys() == second.keys(),
        "worst_share_of_bound": worst,
        "within": worst <= 1,
    }


def _harden(base: Path, aligned: Path, out: Path, recipe: Recipe, device: torch.device) -> None:
    if device.type != "cpu":
        harden(base, aligned, out, recipe=recipe, device=str(device))
        return
    # The CPU in the GPU's place: the same batches through the same pipeline.
    plan = plan_hardening(base, aligned, out, recipe=recipe)
    journal = Journal(out)
    executor = Serial(look_ahead=lambda plan, todo, crew: BatchedAhead(plan, todo, crew.owned(lambda: Pipeline(device))))
    with journal.locked():
        journal.begin(job_description(plan, device))
        run(plan, journal, device, Silent(), executor)


def _read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _hashes(folder: Path) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))]
