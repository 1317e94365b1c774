"""Block Lanczos on many matrices of one shape at once, for devices where waiting costs more than multiplying.

The mathematics and the stop test of maths.lanczos: same start block, same recurrences, same residual, same target. What differs is
who waits for whom. All matrices step together; everything but the small eigenproblems stays on the device; and once per tested step
one small tensor goes to the host. Eigenproblems are solved there: eight of 56 × 56 in float64 take 1 ms on a few cores and several
on a GPU, whose solvers moreover check for failure behind the host's back. Matrices that are done are left out of the products with
the large matrices, which are all that costs. What needs more than lockstep is handed back to maths.lanczos, unfinished: matrices of
exactly low rank, and those that do not converge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lox_merge.maths.block_qr import orthonormal_rows
from lox_merge.maths.krylov_spaces import KrylovSpaces, LongSide, to_device
from lox_merge.maths.lanczos import BASIS, BLOCK, LARGEST_PASSES, RESIDUAL_FLOOR, SMALL_BLOCK, residual_target

# How host work on several matrices is shared out: `map`, or a pool's.
Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]

# Tests that can only fail are left out, but never more than this many in a row: convergence gets faster as it goes on.
_LONGEST_SKIP = 3


@dataclass(frozen=True)
class Found:
    """Triplets of one matrix of a batch, on its device: inner (k, short) and outer (k, long) float32 rows, values (k,) float64."""

    inner: Float[Tensor, "k short"]
    values: Float[Tensor, " k"]
    outer: Float[Tensor, "k long"]
    following: float
    passes: int


@dataclass(frozen=True)
class _Small:
    """What the host is told of one matrix. gram: (size, size), coupling: (w, w) of the remainder, float64."""

    gram: Tensor
    coupling: Tensor
    lost: bool


@dataclass(frozen=True)
class _Verdict:
    """squares, vectors: all Ritz pairs, descending; None where the matrix is handed back. excess: residual / target."""

    squares: Tensor | None
    vectors: Tensor | None
    excess: float = math.inf


def block_width(rank: int) -> int:
    return SMALL_BLOCK if rank <= SMALL_BLOCK else BLOCK


def basis_rows(rank: int) -> int:
    """Vectors of a basis before a restart: never more than half of them are kept."""
    return max(BASIS, 2 * (rank + 2 * block_width(rank)))


def batched_lanczos(
    matrices: Float[Tensor, "b d_out d_in"],
    rank: int,
    *,
    chosen: Sequence[int],
    tolerance: float,
    seed: int,
    run: Run = map,
) -> dict[int, Found]:
    """Leading `rank` triplets of the matrices at the indices `chosen` that converged; the others are for the single path.

    matrices: (b, d_out, d_in) float32, contiguous, not changed; those not chosen are not looked at. tolerance, seed: as in
    truncated_svd. rank: at most half of what a basis of the short side holds. Same batch, same device: same bits. A matrix's
    answer depends on the others of its batch only in its last bits: products of other sizes may add in another order.
    """
    product, width = LongSide(matrices), block_width(rank)
    short, long, device = product.short, product.long, matrices.device
    capacity = basis_rows(rank)
    space = KrylovSpaces(matrices.shape[0], capacity, width, short, long, device)
    start = to_device(torch.randn(width, long, generator=torch.Generator().manual_seed(seed)), device)
    remaining, found = list(chosen), dict[int, Found]()
    product.to_short(start.expand(matrices.shape[0], -1, -1), remaining, space.short_rows)
    block, lost = orthonormal_rows(space.short_rows)
    passes = 1
    pace = _Pace()
    while remaining:
        image = product.to_long(block, remaining, space.long_rows)
        space.add(block, image)
        remainder = space.without(product.to_short(image, remaining, space.short_rows))
        passes += 2
        ending = space.size + width > short or passes >= LARGEST_PASSES
        full = space.size + width > capacity
        due = pace.due() and space.size > rank
        telling = _Told(space, remainder, lost) if ending or full or due else None
        # Queued before the host waits, so that the device has something to do meanwhile.
        block, lost_now = orthonormal_rows(remainder)
        block, lost_again = orthonormal_rows(space.without(block))
        lost = lost | lost_now | lost_again
        if telling is None:
            continue
        small = telling.wait(remaining)
        verdicts = dict(zip(remaining, run(_judge(rank, width, tolerance), small), strict=True))
        done = [index for index in remaining if verdicts[index].excess <= 1]
        for index in done:
            found[index] = _triplets(space, index, rank, verdicts[index], passes)
        handed_back = [index for index in remaining if verdicts[index].squares is None]
        remaining = [] if ending else [index for index in remaining if index not in done and index not in handed_back]
        pace.judged({index: verdicts[index].excess for index in remaining})
        if remaining and full:
            space.restart({index: _leading(verdicts[index], rank + 2 * width) for index in remaining})
    return found


def _leading(verdict: _Verdict, count: int) -> Tensor:
    assert verdict.vectors is not None
    return verdict.vectors[:, :count].T


def _triplets(space: KrylovSpaces, index: int, rank: int, verdict: _Verdict, passes: int) -> Found:
    assert verdict.squares is not None
    inner, values, outer = space.vectors(index, _leading(verdict, rank))
    return Found(inner, values, outer, float(verdict.squares[rank].sqrt()), passes)


class _Told:
    """Gram matrices, couplings and failures of a batch on their way to the host as one tensor: the only thing that the host waits for."""

    def __init__(self, space: KrylovSpaces, remainder: Tensor, lost: Tensor) -> None:
        rows = remainder.double()
        self._shapes = space.gram.shape[1:], (rows.shape[1], rows.shape[1])
        packed = torch.cat([space.gram.flatten(1), (rows @ rows.mT).flatten(1), lost.double()[:, None]], dim=1)
        self._arrived = None
        if packed.device.type == "cuda":
            self._packed = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._packed.copy_(packed, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(packed.device))
        else:
            self._packed = packed

    def wait(self, chosen: Sequence[int]) -> list[_Small]:
        if self._arrived is not None:
            self._arrived.synchronize()
        size, width = self._shapes[0][0], self._shapes[1][0]
        gram, coupling, lost = torch.split(self._packed, [size * size, width * width, 1], dim=1)
        flags = lost[:, 0].tolist()
        return [_Small(gram[index].view(size, size), coupling[index].view(width, width), bool(flags[index])) for index in chosen]


def _judge(rank: int, width: int, tolerance: float) -> Callable[[_Small], _Verdict]:
    """The stop test of maths.lanczos on one matrix."""

    def judge(small: _Small) -> _Verdict:
        if small.lost:
            return _Verdict(None, None)
        squares, vectors = torch.linalg.eigh(small.gram)
        squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
        size = squares.numel()
        # Directions that are zero to working precision: the space is exhausted before it is full.
        if not bool(squares[-1] > squares[0] * RESIDUAL_FLOOR**2):
            return _Verdict(None, None)
        if size <= rank:
            return _Verdict(squares, vectors)  # more directions are asked for than there are: no answer yet
        values = squares[:rank].sqrt()
        last = vectors[size - width :, :rank]
        residual = ((last * (small.coupling @ last)).sum(0).clamp_min(0).sqrt() / values).norm() / values[-1]
        target = residual_target(tolerance, values, float(squares[rank].sqrt()))
        return _Verdict(squares, vectors, float(residual) / target)

    return judge


class _Pace:
    """Which steps are tested. A step whose test can only fail needs none: no solve on the host, and no waiting."""

    def __init__(self) -> None:
        self._last: dict[int, float] = {}
        self._step = self._tested = self._next = 0

    def due(self) -> bool:
        """Called once a step."""
        self._step += 1
        return self._step >= self._next

    def judged(self, excesses: dict[int, float]) -> None:
        """excesses: residual / target of the matrices that go on, after the test of this step."""
        steps = self._step - self._tested
        waits = [_steps_to_wait(self._last.get(index, math.inf), now, steps) for index, now in excesses.items()]
        self._last, self._tested = excesses, self._step
        self._next = self._step + 1 + min(waits, default=0)


def _steps_to_wait(before: float, now: float, steps: int) -> int:
    """Steps that leave `now` above 1 even if each shrinks it twice as much (in logarithms) as the `steps` since `before` did."""
    if not (math.isfinite(before) and 1 < now < before):
        return 0
    rate = 2 * math.log(before / now) / steps
    return min(_LONGEST_SKIP, math.ceil(math.log(now) / rate) - 1)
