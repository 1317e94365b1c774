"""The work on one matrix, and a bounded crew of threads that does it ahead of the writer."""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lox_merge.errors import LoxMergeWarning, NumericalError
from lox_merge.jobs.layout import MatrixView
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.select import TensorPlan
from lox_merge.jobs.triplets import TakenNow, TripletSource
from lox_merge.maths.edits import Realised, lox_edit
from lox_merge.maths.lanczos import BASIS, BLOCK
from lox_merge.maths.rank import RankRule
from lox_merge.maths.spectral import DENSE_SHARE, EXACT_SIDE
from lox_merge.maths.subspace import Certificate, Subspace

# Matrices in flight may take this much memory together, beside the largest one: work goes on while that one is in the way.
IN_FLIGHT_BYTES = 512 * 2**20

Result = TypeVar("Result")


@dataclass(frozen=True)
class MatrixResult:
    """What was done to one matrix. bad: number of NaN and Inf in its delta (then nothing else holds)."""

    label: str
    shape: tuple[int, int]
    bad: int = 0
    changed: bool = False
    subspace: Subspace | None = None
    delta_norm: float = 0.0
    realised: Realised | None = None

    def to_json(self) -> dict[str, Any]:
        """The manifest's record. Undefined values are null."""
        record: dict[str, Any] = {"part": self.label, "shape": list(self.shape), "delta_norm": self.delta_norm}
        if not self.changed:
            return record | {"rank": 0, "singular_values": [], "r_align": None, "certificate": None, "realised": None}
        subspace, realised = self.subspace, self.realised
        record["rank"] = "full" if subspace is None else subspace.rank
        record["singular_values"] = None if subspace is None else subspace.singular_values.tolist()
        record["r_align"] = 1.0 if subspace is None else subspace.alignment_ratio
        if subspace is None:
            record["certificate"] = None
        else:
            record["certificate"] = certificate_record(subspace.certificate)
        assert realised is not None
        record["realised"] = {
            "gain": realised.gain,
            "cosine": realised.cosine,
            "intended_norm": realised.intended_norm,
            "realised_norm": realised.realised_norm,
        }
        return record


def certificate_record(certificate: Certificate) -> dict[str, Any]:
    """A certificate and its bounds as plain values; bounds that do not exist are null."""
    return {
        "method": certificate.method,
        "residual": certificate.residual,
        "next_singular_value": certificate.next_singular_value,
        "angle_bound": certificate.angle_bound,
        "projection_error_bound": certificate.projection_error_bound,
        "ambiguous": certificate.ambiguous,
        "passes": certificate.passes,
    }


def edit_matrix(
    base: Tensor,
    aligned: Tensor,
    out: Tensor,
    view: MatrixView,
    tensor: TensorPlan,
    recipe: Recipe,
    device: torch.device,
    triplets: TripletSource | None = None,
) -> MatrixResult:
    """Writes the hardened matrix into `out` (a view of the output tensor); aligned's values for a zero or non-finite delta.

    triplets: where the delta's leading triplets come from; None takes an SVD of it.
    """
    source = triplets or TakenNow(recipe)
    try:
        return _edit(base, aligned, out, view, tensor, recipe, device, source)
    except torch.cuda.OutOfMemoryError:
        warnings.warn(
            f"{tensor.name}{view.label} ({list(view.shape)}) did not fit on {device}; it was edited on the CPU", LoxMergeWarning, stacklevel=2
        )
        return _edit(base, aligned, out, view, tensor, recipe, torch.device("cpu"), source)
    except NumericalError as error:
        raise NumericalError(f"tensor {tensor.name}{view.label}: {error}.") from error


def _edit(
    base: Tensor,
    aligned: Tensor,
    out: Tensor,
    view: MatrixView,
    tensor: TensorPlan,
    recipe: Recipe,
    device: torch.device,
    triplets: TripletSource,
) -> MatrixResult:
    base, aligned = base.to(device), aligned.to(device)
    delta, norm, bad = form_delta(base, aligned)
    if bad:
        out.copy_(aligned)
        return MatrixResult(view.label, view.shape, bad=bad)
    if norm == 0:
        out.copy_(aligned)
        return MatrixResult(view.label, view.shape)
    assert tensor.rank is not None
    # Every matrix starts its SVD from the same seed, but draws its own rounding noise.
    digest = hashlib.sha256(f"{recipe.seed}:{tensor.name}{view.label}".encode()).digest()
    # On a GPU the result is made there and copied back whole.
    target = out if device.type == "cpu" else torch.empty(out.shape, dtype=out.dtype, device=device)
    _, subspace, realised = lox_edit(
        base,
        aligned,
        tensor.rank,
        tensor.alpha,
        rounding=recipe.rounding,
        seed=recipe.seed,
        rounding_seed=int.from_bytes(digest[:7], "big"),
        delta=delta,
        subspace=None if tensor.rank.kind == "full" else triplets.subspace(tensor, view, delta, aligned),
        out=target,
    )
    if target is not out:
        out.copy_(target)
    return MatrixResult(view.label, view.shape, changed=True, subspace=subspace, delta_norm=norm, realised=realised)


def form_delta(base: Tensor, aligned: Tensor) -> tuple[Tensor, float, int]:
    """W_align - W_base in float32, its Frobenius norm, and how many of its entries are NaN or Inf (then the norm is none).

    base, aligned: (d_out, d_in), on one device. On the CPU the delta's memory is this thread's until the next call.
    """
    delta = _scratch((aligned.shape[0], aligned.shape[1]), aligned.device)
    if torch.promote_types(torch.float32, torch.promote_types(base.dtype, aligned.dtype)) == torch.float64:
        torch.sub(aligned.double(), base.double(), out=delta)
    else:
        delta.copy_(aligned).sub_(base)
    norm = float(torch.linalg.vector_norm(delta, dim=1).double().norm())
    bad = 0 if norm < float("inf") else max(1, int((~torch.isfinite(delta)).sum()))
    return delta, norm, bad


def available_cores() -> int:
    """Cores that this process may use: fewer than the machine has in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Scratch(threading.local):
    """A thread's buffer for deltas. Fresh memory costs a page fault every 4 kB: a third of the time to form a delta."""

    buffer: Tensor | None = None


_SCRATCH = _Scratch()


def _scratch(shape: tuple[int, int], device: torch.device) -> Tensor:
    """A float32 matrix on `device`; on the CPU its memory is this thread's until the next call."""
    size = shape[0] * shape[1]
    if device.type != "cpu":
        return torch.empty(shape, device=device)
    if _SCRATCH.buffer is None or _SCRATCH.buffer.numel() < size:
        _SCRATCH.buffer = None  # let go of the old one before asking for the larger
        _SCRATCH.buffer = torch.empty(size)
    return _SCRATCH.buffer[:size].view(shape)


def working_memory(shape: tuple[int, int], rank: RankRule) -> int:
    """Upper estimate of the bytes that editing one matrix takes beside mapped files and its place in the output."""
    short, long = sorted(shape)
    entries = short * long
    k = rank.from_shape(short)
    needed = 4 * entries
    if rank.kind == "full":
        return needed
    if short <= EXACT_SIDE:
        return needed + 3 * 8 * entries
    if k is not None and k <= DENSE_SHARE * short:
        basis = max(BASIS, 2 * k) + BLOCK
        return needed + basis * (4 * short + 8 * long) + 12 * BLOCK * long
    return needed + 4 * 8 * short * short + 8 * long * (k or short)


class Crew:
    """Threads that edit matrices ahead of the writer, within a memory budget.

    On a CPU one thread per matrix with few cores each beats one matrix on all cores: the products are thin. The number
    of threads follows from the machine and the sizes alone, so that two runs of one job do the same arithmetic.
    """

    def __init__(self, device: torch.device, typical_bytes: int) -> None:
        self.device = device
        cores = available_cores()
        self.workers = 1 if device.type != "cpu" else max(1, min(cores, IN_FLIGHT_BYTES // max(1, typical_bytes)))
        self.threads_each = max(1, cores // self.workers) if device.type == "cpu" else torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="edit")

    def submit(self, work: Callable[..., Result], *arguments: Any) -> Future[Result]:
        return self._pool.submit(work, *arguments)

    @contextmanager
    def threads(self) -> Iterator[None]:
        """torch's thread count for the duration of the run."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads_each)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
