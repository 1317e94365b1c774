"""Block Lanczos on many matrices of one shape at once, for devices where waiting costs more than multiplying.

The mathematics and the stop test of maths.lanczos: same start block, same recurrences, same residual, same target. What differs is
who waits for whom. All matrices step together; everything but the small eigenproblems stays on the device; and once per tested step
one small tensor goes to the host. Eigenproblems are solved there: a GPU takes longer for them beyond 32 × 32, and its solvers check for
failure behind the host's back. Matrices that are done are left out of the products with the large matrices, which are all that costs. What
needs more than lockstep is handed back to maths.lanczos, unfinished: matrices of exactly low rank, and those that do not converge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import numpy.typing
import torch
from jaxtyping import Float
from torch import Tensor

from lox_merge.maths.krylov_spaces import FIRST_ROWS, KrylovSpaces, Numbers, Telling, Triplets, spaces_for
from lox_merge.maths.lanczos import BASIS, BLOCK, LARGEST_PASSES, RESIDUAL_FLOOR, SMALL_BLOCK, residual_target

Flags = numpy.typing.NDArray[numpy.bool_]

# How host work on several matrices is shared out: `map`, or a pool's.
Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]

# Tests that can hardly succeed are left out, but never more than this many in a row.
_LONGEST_SKIP = 3
# Convergence gets faster as it goes on: each step shrinks the logarithm of what is too much by up to this many times what the last did.
_FASTER = 1.4
# Before two tests have told how fast it is: this much.
_FIRST_RATE = 3.0
# So many eigenproblems are one thread's: one is solved before another thread has begun.
_TOGETHER = 2


@dataclass(frozen=True)
class Found:
    """Triplets of one matrix of a batch, with their residual; following: s_{k+1}."""

    triplets: Triplets
    following: float
    passes: int


@dataclass(frozen=True)
class _Verdict:
    """squares, vectors: all Ritz pairs, descending; None where the matrix is handed back. excess: residual / target."""

    squares: Numbers | None
    vectors: Numbers | None
    excess: float = math.inf

    def leading(self, count: int) -> Numbers:
        """(count, size), the first Ritz vectors as rows."""
        assert self.vectors is not None
        return self.vectors[:, :count].T


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
    width, capacity = block_width(rank), basis_rows(rank)
    if not chosen:
        return {}
    user = torch.cuda.current_stream(matrices.device) if matrices.device.type == "cuda" else None
    rows = FIRST_ROWS if rank + 2 * width <= FIRST_ROWS else capacity
    with spaces_for(matrices, rows, width, rank) as space:
        try:
            return _Lockstep(space, list(chosen), min(matrices.shape[1:]), rank, capacity, tolerance, run, user).results(matrices, seed)
        finally:
            space.let_go()


class _Lockstep:
    """Matrices on their way. remaining: those that go on; settled: what waits to be finished."""

    def __init__(
        self, space: KrylovSpaces, chosen: list[int], short: int, rank: int, capacity: int, tolerance: float, run: Run, user: torch.cuda.Stream | None
    ) -> None:
        self._space, self._remaining, self._short, self._rank, self._capacity = space, chosen, short, rank, capacity
        self._tolerance, self._run, self._user = tolerance, run, user
        self._pace, self._passes = _Pace(), 0
        self._settled, self._found = dict[int, _Settled](), dict[int, Found]()

    def results(self, matrices: Tensor, seed: int) -> dict[int, Found]:
        self._space.start(matrices, self._remaining, seed)
        self._passes = 1
        untold: tuple[Telling, int] | None = None
        while self._remaining:
            space, width = self._space, self._space.width
            space.add(self._remaining)
            self._passes += 2
            ahead = untold is not None
            if untold is not None:
                space.follow()
                self._judge(*untold)
                untold = None
                if not self._remaining:
                    break
            ending = space.size + width > self._short or self._passes >= LARGEST_PASSES
            full = space.size + width > space.rows
            restarting = full and space.rows >= self._capacity
            # A space of little more than the wanted directions does not hold them yet.
            due = self._pace.due() and space.size >= self._rank + 2 * width
            told = space.tell() if ending or restarting or due else None
            # Queued before the host waits, so that the device has something to do meanwhile.
            if not ahead:
                space.follow()
            verdicts: dict[int, _Verdict] = {}
            if told is not None and not (full or ending or self._pace.hopeful):
                untold = told, self._pace.step  # it will hardly be enough: the device goes on with the next step
            elif told is not None:
                verdicts = self._judge(told, self._pace.step)
            if ending:
                break
            if full:
                self._finish()  # as long as rows are only added, what is settled waits for the others
            if full and not restarting:
                self._space = space.larger(self._capacity)
            elif full and self._remaining:
                space.restart({index: verdicts[index].leading(self._rank + 2 * width) for index in self._remaining})
        self._finish()
        return self._found

    def _judge(self, told: Telling, step: int) -> dict[int, _Verdict]:
        judged = _judged(*told.wait(self._remaining), self._rank, self._tolerance, self._run)
        verdicts = dict(zip(self._remaining, judged, strict=True))
        self._settled |= {index: _Settled(verdict, self._passes) for index, verdict in verdicts.items() if verdict.excess <= 1}
        # The others that have no pairs are handed back.
        self._remaining = [index for index, verdict in verdicts.items() if index not in self._settled and verdict.squares is not None]
        self._pace.judged(step, {index: verdicts[index].excess for index in self._remaining})
        return verdicts

    def _finish(self) -> None:
        if not self._settled:
            return
        triplets = self._space.finish({index: one.verdict.leading(self._rank) for index, one in self._settled.items()}, self._user)
        for index, one in self._settled.items():
            assert one.verdict.squares is not None
            self._found[index] = Found(triplets[index], math.sqrt(one.verdict.squares[self._rank]), one.passes + 1)
        self._settled = {}


@dataclass(frozen=True)
class _Settled:
    verdict: _Verdict
    passes: int


def _judged(gram: Numbers, coupling: Numbers, lost: Flags, rank: int, tolerance: float, run: Run) -> list[_Verdict]:
    """The stop test of maths.lanczos on each of a few matrices. What it is told: see krylov_spaces.Telling.

    numpy for all but the eigenproblems: an operation on numbers as few as these takes torch ten times as long.
    """
    count, size, width = len(gram), gram.shape[1], coupling.shape[1]
    usable = ~lost & numpy.isfinite(gram).all(axis=(1, 2))
    if not usable.all():
        gram = numpy.where(usable[:, None, None], gram, numpy.eye(size))
    parts = list(run(torch.linalg.eigh, torch.tensor_split(torch.from_numpy(gram), -(-count // _TOGETHER))))
    squares = numpy.concatenate([part[0].numpy() for part in parts])[:, ::-1].clip(min=0)
    vectors = numpy.concatenate([part[1].numpy() for part in parts])[:, :, ::-1]
    # Directions that are zero to working precision: the space is exhausted before it is full.
    good = usable & (squares[:, -1] > squares[:, 0] * RESIDUAL_FLOOR**2)
    excesses = [math.inf] * count
    if size > rank:  # else more directions are asked for than there are: no answer yet
        values, last = numpy.sqrt(squares[:, :rank]), vectors[:, size - width :, :rank]
        with numpy.errstate(all="ignore"):  # of those that are not good
            along = numpy.sqrt((last * (coupling @ last)).sum(1).clip(min=0)) / values
            residuals = numpy.sqrt(numpy.square(along).sum(1)) / values[:, -1]
        following = numpy.sqrt(squares[:, rank]).tolist()
        for index in good.nonzero()[0].tolist():
            excesses[index] = float(residuals[index]) / residual_target(tolerance, values[index].tolist(), following[index])
    return [_Verdict(squares[index], vectors[index], excesses[index]) if good[index] else _Verdict(None, None) for index in range(count)]


class _Pace:
    """Which steps are tested. A step whose test can hardly succeed needs none: no solve on the host, and no waiting.

    hopeful: whether the next test is one that was waited for, and not only there to tell how far there is to go.
    """

    def __init__(self) -> None:
        self._last: dict[int, float] = {}
        self._step = self._tested = self._next = 0
        self.hopeful = False

    @property
    def step(self) -> int:
        return self._step

    def due(self) -> bool:
        """Called once a step."""
        self._step += 1
        return self._step >= self._next

    def judged(self, step: int, excesses: dict[int, float]) -> None:
        """excesses: residual / target of the matrices that go on, after the test of this step."""
        steps = step - self._tested
        waits = [_steps_to_wait(self._last.get(index, math.inf), now, steps) for index, now in excesses.items()]
        self._last, self._tested, self.hopeful = excesses, step, True
        self._next = step + 1 + min(waits, default=0)


def _steps_to_wait(before: float, now: float, steps: int) -> int:
    """Steps that leave `now` above 1 even if each shrinks its logarithm _FASTER times as much as the `steps` since `before` did."""
    if not 1 < now < before or math.isinf(now):
        return 0
    rate = _FASTER * math.log(before / now) / steps if math.isfinite(before) else _FIRST_RATE
    return min(_LONGEST_SKIP, math.ceil(math.log(now) / rate) - 1)
