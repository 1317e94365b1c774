"""What the work on every matrix needs: deltas, memory estimates, and a bounded crew of threads ahead of the writer."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lox_merge.maths.lanczos import BASIS, BLOCK
from lox_merge.maths.pieces import piece_buffer, rows_at_once
from lox_merge.maths.rank import RankRule
from lox_merge.maths.spectral import DENSE_SHARE, EXACT_SIDE, too_large
from lox_merge.maths.subspace import Certificate

# Matrices in flight may take this much memory together, beside the largest one: work goes on while that one is in the way.
IN_FLIGHT_BYTES = 512 * 2**20

Result = TypeVar("Result")


class Closable(Protocol):
    def close(self) -> None: ...


Owned = TypeVar("Owned", bound=Closable)


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


def matrix_seed(seed: int, matrix: str) -> int:
    """A seed of its own for every matrix of a job, by its name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{matrix}".encode()).digest()[:7], "big")


def form_delta(base: Tensor, aligned: Tensor, slot: int = 0) -> tuple[Tensor, float, int]:
    """W_align - W_base in float32, its Frobenius norm, and how many of its entries are NaN or Inf (then the norm is none).

    base, aligned: (d_out, d_in), on one device. On the CPU the delta's memory is this thread's until the next call with this `slot`.
    Raises NumericalError for a delta of finite entries that is too large to be worked on.
    """
    delta = _scratch((aligned.shape[0], aligned.shape[1]), aligned.device, slot)
    norm = float(_subtract(base, aligned, delta).double().norm())
    return delta, norm, _bad_entries(delta, norm)


def form_deltas(base: Tensor, aligned: Tensor) -> tuple[Tensor, list[float], list[int]]:
    """`form_delta` of matrices (b, d_out, d_in), with fresh memory. The host waits once for all of them. Raises NumericalError as that does."""
    delta = torch.empty(aligned.shape, device=aligned.device)
    row_norms = [_subtract(earlier, later, one) for one, earlier, later in zip(delta, base, aligned, strict=True)]
    norms = torch.stack(row_norms).double().norm(dim=1).tolist()
    return delta, norms, [_bad_entries(one, norm) for one, norm in zip(delta, norms, strict=True)]


def _bad_entries(delta: Tensor, norm: float) -> int:
    """How many entries are NaN or Inf, norm: of the delta. Raises NumericalError where none is, and their squares overflow."""
    if norm < float("inf"):
        return 0
    bad = int((~torch.isfinite(delta)).sum())
    if not bad:
        raise too_large(delta)
    return bad


def _subtract(base: Tensor, aligned: Tensor, delta: Tensor) -> Tensor:
    """Writes aligned − base into `delta`, a piece of rows at a time. Returns the norm of every row."""
    # float64 weights are subtracted as such: of their difference float32 keeps what matters.
    wide = torch.promote_types(torch.float32, torch.promote_types(base.dtype, aligned.dtype))
    later = None if wide == torch.float32 else piece_buffer(delta, wide)
    earlier, row_norms = piece_buffer(delta, wide), torch.empty(delta.shape[0], device=delta.device)
    step = rows_at_once(delta)
    for part, after, before, norms in zip(*(torch.split(matrix, step) for matrix in (delta, aligned, base, row_norms)), strict=True):
        before = earlier[: len(part)].copy_(before)
        if later is None:
            part.copy_(after).sub_(before)
        else:
            part.copy_(later[: len(part)].copy_(after).sub_(before))
        torch.linalg.vector_norm(part, dim=1, out=norms)
    return row_norms


def available_cores() -> int:
    """Cores that this process may use: fewer than the machine has in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Scratch(threading.local):
    """A thread's buffers for deltas. Fresh memory costs a page fault every 4 kB: a third of the time to form a delta."""

    def __init__(self) -> None:
        self.buffers: dict[int, Tensor] = {}


_SCRATCH = _Scratch()


def _scratch(shape: tuple[int, int], device: torch.device, slot: int) -> Tensor:
    """A float32 matrix on `device`; on the CPU its memory is this thread's until the next call with this `slot`."""
    size = shape[0] * shape[1]
    if device.type != "cpu":
        return torch.empty(shape, device=device)
    if slot not in _SCRATCH.buffers or _SCRATCH.buffers[slot].numel() < size:
        _SCRATCH.buffers.pop(slot, None)  # let go of the old one before asking for the larger
        _SCRATCH.buffers[slot] = torch.empty(size)
    return _SCRATCH.buffers[slot][:size].view(shape)


@cache
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


@dataclass(frozen=True)
class CrewSize:
    """matrices: how many are edited at a time, one thread each. cores: what each of them takes; it decides the order of sums, and so bytes."""

    matrices: int
    cores: int

    @classmethod
    def of(cls, device: torch.device, typical_bytes: int) -> CrewSize:
        """For one process that has the machine for itself. typical_bytes: working memory of a matrix in the middle of the work."""
        if device.type != "cpu":
            return cls(1, torch.get_num_threads())
        cores = available_cores()
        matrices = max(1, min(cores, IN_FLIGHT_BYTES // max(1, typical_bytes)))
        return cls(matrices, max(1, cores // matrices))

    def shared(self, processes: int) -> CrewSize:
        """For each of several processes on the machine. A matrix takes as many cores as ever: the bytes stay the same."""
        return CrewSize(max(1, self.matrices // processes), self.cores)


def computing_pool(threads: int, cores: int, name: str) -> ThreadPoolExecutor:
    """Threads that compute on `cores` cores each. torch tells LAPACK so in every thread by itself, and only when it first shares out work of its
    own: a new thread would take all cores for what it decomposes before, which is another matrix in every run."""
    return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=torch.set_num_threads, initargs=(cores,))


class Crew:
    """Threads that edit matrices ahead of the writer, within a memory budget.

    On a CPU one thread per matrix with few cores each beats one matrix on all cores: the products are thin. The number
    of threads follows from the machine and the sizes alone, so that two runs of one job do the same arithmetic.
    """

    def __init__(self, device: torch.device, size: CrewSize) -> None:
        self.device = device
        self.workers, self.threads_each = size.matrices, size.cores
        self._pool = computing_pool(self.workers, self.threads_each, "edit")
        self._owned: Any = None

    def submit(self, work: Callable[..., Result], *arguments: Any) -> Future[Result]:
        return self._pool.submit(work, *arguments)

    def owned(self, make: Callable[[], Owned]) -> Owned:
        """What the crew works with on its device: made when it is first asked for, closed with the crew."""
        if self._owned is None:
            self._owned = make()
        owned: Owned = self._owned
        return owned

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
        if self._owned is not None:
            self._owned.close()
