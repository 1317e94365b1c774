"""The Krylov spaces of many matrices of one shape. Nothing here makes the host wait but what is asked of `Telling` and `finish`."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy
import numpy.typing
import torch
from jaxtyping import Float
from torch import Tensor

from lox_merge.maths.block_qr import orthonormal_rows
from lox_merge.maths.lanes import Lanes, borrowed, lanes_of
from lox_merge.maths.replayed import Replayed
from lox_merge.maths.thin_products import LongSide, fast_kernels, products_of_rows
from lox_merge.maths.transport import arriving, to_device

# Rows of a basis that are always taken whole, those not yet found being zero: its steps are alike then, and can be recorded. Most deltas
# of trained models need no more at low ranks, and the zeros are less than a tenth of what the matrices are.
FIRST_ROWS = 64

Numbers = numpy.typing.NDArray[numpy.float64]


@dataclass(frozen=True)
class Triplets:
    """Of one matrix: inner (short, k) and outer (long, k) float32 on its device, values (k,) float64 on the host, descending.

    residual: ||A outer − inner diag(values)||_F by one explicit product; the other residual vanishes by construction.
    """

    inner: Float[Tensor, "short k"]
    values: Float[Tensor, " k"]
    outer: Float[Tensor, "long k"]
    residual: float


class KrylovSpaces:
    """The Krylov spaces of matrices (count, short, long), in either layout, by blocks of `width` rows, for `rank` triplets.

    basis: (count, rows, short) float32, orthonormal rows of which `size` are found and the others zero; images: basis · A, (count, rows,
    long) float64; gram: images · imagesᵀ, (count, rows, rows) float64, the lower triangle. block: (count, width, short), the next rows.
    lost: (count,), matrices whose blocks were dependent to working precision. rows: how many there is memory for.
    """

    def __init__(self, count: int, rows: int, width: int, rank: int, short: int, long: int, device: torch.device) -> None:
        self.count, self.rows, self.width, self.rank, self.device = count, rows, width, rank, device

        def zeros(*sides: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(count, *sides, dtype=dtype, device=device)

        self._basis, self._images = zeros(rows, short), zeros(rows, long, dtype=torch.float64)
        self._gram = zeros(rows, rows, dtype=torch.float64)
        self._block, self._lost = zeros(width, short), zeros(dtype=torch.bool)
        # Zeros, not empty: rows of matrices that are done, or were never chosen, stay finite.
        self._short_rows, self._long_rows = zeros(width, short), zeros(width, long)
        # What the host is told, as one tensor: gram, coupling, lost.
        self._told = zeros(rows * rows + width * width + 1, dtype=torch.float64)
        self._told_here = _on_host(self._told)
        # What it says in the end, and is told of that.
        self._rotation, self._evidence = zeros(rank, rows, dtype=torch.float64), zeros(rank + 1, dtype=torch.float64)
        self._rotation_here, self._evidence_here = _on_host(self._rotation), _on_host(self._evidence)
        self._explicit, self._inner, self._outer = zeros(rank, short), zeros(short, rank), zeros(long, rank)
        # Where the next rows go, on the device: what is recorded must not depend on a number of the host.
        self._first_places = torch.arange(width, device=device)
        self._places = self._first_places.clone()
        self._start_rows, self._seed = zeros(width, long), -1
        self._address = torch.zeros(1, dtype=torch.int64, device=device)
        self._basis_address = to_device(torch.tensor([self._basis.data_ptr()]), device)
        self._product: LongSide | None = None
        everything = range(count)
        self._start_all = Replayed(lambda: self._start(everything), device)
        self._add_all = Replayed(lambda: self._add(everything), device)
        self._follow_all = Replayed(self._follow, device)
        self._finish_all = Replayed(lambda: self._finish(everything), device)
        self.size = 0

    @property
    def bytes(self) -> int:
        """What it takes on the device, about: what is recorded keeps some more."""
        parts = self._basis, self._images, self._gram, self._told, self._start_rows, self._long_rows, self._outer
        return sum(part.numel() * part.element_size() for part in parts) * 5 // 4

    def start(self, matrices: Tensor, chosen: Sequence[int], seed: int) -> None:
        """New matrices. The first block is of the space of random rows · Aᵀ."""
        if seed != self._seed:
            rows = torch.randn(self._start_rows.shape[1:], generator=torch.Generator().manual_seed(seed))
            self._start_rows.copy_(to_device(rows, self.device))
            self._seed = seed
        self._product = LongSide(matrices, self._address)
        self.size = 0
        if self._recordable(chosen):
            self._start_all()
        else:
            self._start(chosen)

    def add(self, chosen: Sequence[int]) -> None:
        """The block joins the basis; two products with each of the chosen matrices."""
        if self._recordable(chosen):
            self._add_all()
        else:
            self._add(chosen)
        self.size += self.width

    def follow(self) -> None:
        """The next block, of what A Aᵀ makes of the last one."""
        if self._recordable(range(self.count)):
            self._follow_all()
        else:
            self._follow()

    def finish(self, rotations: Mapping[int, Numbers], user: torch.cuda.Stream | None) -> dict[int, Triplets]:
        """Triplets of some matrices from their leading Ritz vectors (rank, size or less). The host waits. user: the stream they are for."""
        self._rotation_here.zero_()
        numbers = self._rotation_here.numpy()
        for index, rotation in rotations.items():
            numbers[index, :, : rotation.shape[1]] = rotation
        self._rotation.copy_(self._rotation_here, non_blocking=True)
        chosen, fast = sorted(rotations), fast_kernels(self.device)
        if fast is not None and self.rank <= fast.LARGEST_WIDTH and self._recordable(chosen):
            self._finish_all()
        else:
            self._finish(chosen)
        arrived = arriving(self._evidence, self._evidence_here)
        # Copies: the next matrices are written to the same place.
        inner, outer = self._inner.clone(), self._outer.clone()
        if user is not None:
            inner.record_stream(user)
            outer.record_stream(user)
        arrived()
        values, residuals = self._evidence_here[:, : self.rank].clone(), self._evidence_here[:, self.rank].tolist()
        return {index: Triplets(inner[index], values[index], outer[index], residuals[index]) for index in chosen}

    def let_go(self) -> None:
        """The matrices are not held any longer: they take far more memory than what is kept of their shape."""
        self._product = None

    @property
    def _padded(self) -> bool:
        return self.rows <= FIRST_ROWS

    def _recordable(self, chosen: Sequence[int]) -> bool:
        return len(chosen) == self.count and self._padded and self._product is not None and self._product.recordable

    def _start(self, chosen: Sequence[int]) -> None:
        assert self._product is not None
        for kept in (self._basis, self._images, self._gram, self._short_rows, self._long_rows, self._lost):
            kept.zero_()
        self._places.copy_(self._first_places)
        block, _ = orthonormal_rows(self._product.to_short(self._start_rows, chosen, self._short_rows), self._lost)
        self._block.copy_(orthonormal_rows(block, self._lost, nearly=True)[0])

    def _add(self, chosen: Sequence[int]) -> None:
        assert self._product is not None
        image = self._product.to_long(self._block, chosen, self._long_rows)
        self._basis.index_copy_(1, self._places, self._block)
        self._images.index_copy_(1, self._places, image.double())
        used = self.rows if self._padded else self.size + self.width
        self._gram[:, :, :used].index_copy_(1, self._places, products_of_rows(image, self._images[:, :used]))
        self._places += self.width
        remainder = self._without(self._product.to_short(self._long_rows, chosen, self._short_rows), used, rounds=2)
        square, coupled = self.rows**2, self.width**2
        self._told[:, -1] = self._lost  # of the rows that are in the basis, not of those to come
        block, coupling = orthonormal_rows(remainder, self._lost)
        self._block.copy_(block)
        self._told[:, :square] = self._gram.flatten(1)
        self._told[:, square : square + coupled] = coupling.flatten(1)

    def _follow(self) -> None:
        used = self.rows if self._padded else self.size
        # A second pass over the new block: where the remainder is nearly zero its directions are rounding, not orthogonal yet.
        again = self._without(self._block, used, rounds=1)
        self._block.copy_(orthonormal_rows(again, self._lost, nearly=True)[0])

    def _finish(self, chosen: Sequence[int]) -> None:
        assert self._product is not None
        used = self.rows if self._padded else self.size
        rotation = self._rotation[:, :, :used]
        inner, outer = rotation.float() @ self._basis[:, :used], rotation @ self._images[:, :used]
        values = torch.linalg.vector_norm(outer, dim=2)
        outer = (outer / values[:, :, None]).float()
        explicit = self._product.to_short(outer, chosen, self._explicit)
        self._evidence[:, : self.rank] = values
        self._evidence[:, self.rank] = torch.linalg.vector_norm((explicit - inner * values.float()[:, :, None]).double(), dim=(1, 2))
        self._inner.copy_(inner.mT)
        self._outer.copy_(outer.mT)

    def _without(self, block: Tensor, used: int, rounds: int) -> Tensor:
        """`block` made orthogonal to the basis; in two rounds where it may lie along it, because one leaves cancellation errors."""
        basis, fast = self._basis[:, :used], fast_kernels(self.device) if self._padded else None
        for _ in range(rounds):
            if fast is None:
                along = block @ basis.mT
            else:
                along = torch.empty(self.count, self.width, used, device=self.device)
                fast.rows_times(block, basis.mT, along, self._basis_address)
            block = torch.baddbmm(block, along, basis, alpha=-1)
        return block

    def tell(self) -> Telling:
        """What the stop test looks at, on its way to the host."""
        return Telling(self._told, self._told_here, self.rows, self.size, self.width)

    def larger(self, rows: int) -> KrylovSpaces:
        """The same with memory for more rows."""
        other = KrylovSpaces(self.count, rows, self.width, self.rank, self._basis.shape[2], self._images.shape[2], self.device)
        other._basis[:, : self.rows], other._images[:, : self.rows] = self._basis, self._images
        other._gram[:, : self.rows, : self.rows] = self._gram
        for name in ("_block", "_short_rows", "_long_rows", "_lost", "_places"):
            getattr(other, name).copy_(getattr(self, name))
        other._product, other.size = self._product, self.size
        return other

    def restart(self, leading: Mapping[int, Numbers]) -> None:
        """Thick restart: the leading Ritz vectors (keep, size) of each matrix that goes on stay."""
        keep = next(iter(leading.values())).shape[0]
        kept = torch.zeros(self.count, keep, self.size, dtype=torch.float64)
        for index, vectors in leading.items():
            kept.numpy()[index] = vectors
        rotation = to_device(kept, self.device)
        basis, images = rotation.float() @ self._basis[:, : self.size], rotation @ self._images[:, : self.size]
        self._basis[:, :keep], self._images[:, :keep] = basis, images
        self._gram.zero_()
        self._gram[:, :keep, :keep] = images @ images.mT
        self._places.copy_(self._first_places).add_(keep)
        self.size = keep


def spaces_for(matrices: Tensor, rows: int, width: int, rank: int) -> AbstractContextManager[KrylovSpaces]:
    """Spaces for matrices (b, d_out, d_in), to be started. On a GPU what is done with them goes to a stream of theirs, and they are kept,
    with what was recorded, for the next matrices of this shape."""
    (short, long), device = sorted(matrices.shape[1:]), matrices.device
    sizes = matrices.shape[0], rows, width, rank, short, long

    def make() -> KrylovSpaces:
        return KrylovSpaces(*sizes, device)

    if device.type != "cuda" or rows > FIRST_ROWS:
        return nullcontext(make())
    return borrowed(_lanes(device), (*sizes, matrices.shape[1] <= matrices.shape[2]), make)


def forget_spaces(device: torch.device) -> None:
    """Lets go of spaces that are kept and not in use: there is too little memory."""
    for other, lanes in _LANES.items():
        if device.index in (None, other.index):
            lanes.forget()


_LANES: dict[torch.device, Lanes[KrylovSpaces]] = {}
_LANES_LOCK = threading.Lock()


def _lanes(device: torch.device) -> Lanes[KrylovSpaces]:
    with _LANES_LOCK:
        if device not in _LANES:
            _LANES[device] = lanes_of(device)
        return _LANES[device]


class Telling:
    """Gram matrices, couplings and failures of a batch on their way to the host as one tensor."""

    def __init__(self, told: Tensor, here: Tensor, rows: int, size: int, width: int) -> None:
        self._arrived, self._numbers = arriving(told, here), here.numpy()
        self._rows, self._size, self._width = rows, size, width

    def wait(self, chosen: Sequence[int]) -> tuple[Numbers, Numbers, numpy.typing.NDArray[numpy.bool_]]:
        """gram (n, size, size), lower triangles, and coupling (n, w, w) of the remainders; lost (n,): those of the chosen."""
        self._arrived()
        numbers, square = self._numbers[list(chosen)], self._rows**2
        gram = numbers[:, :square].reshape(-1, self._rows, self._rows)[:, : self._size, : self._size]
        return gram, numbers[:, square:-1].reshape(-1, self._width, self._width), numbers[:, -1] != 0


def _on_host(there: Tensor) -> Tensor:
    """Memory for it on the host that a device reads and writes by itself."""
    return torch.zeros(there.shape, dtype=there.dtype, pin_memory=there.device.type == "cuda")
