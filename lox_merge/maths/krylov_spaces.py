"""The Krylov spaces of many matrices of one shape, and the thin products that they grow by. Nothing here makes the host wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


class LongSide:
    """Products of thin rows with a batch of matrices (b, d_out, d_in) from one side to the other."""

    def __init__(self, matrices: Float[Tensor, "b d_out d_in"]) -> None:
        wide = matrices.shape[1] <= matrices.shape[2]
        self._from_short, self._from_long = (matrices, matrices.mT) if wide else (matrices.mT, matrices)
        self.short, self.long = self._from_short.shape[1:]

    def to_long(self, rows: Tensor, chosen: Sequence[int], out: Tensor) -> Tensor:
        """out[i] = rows[i] A_i for the chosen; the others keep what they had."""
        return self._product(rows, self._from_short, chosen, out)

    def to_short(self, rows: Tensor, chosen: Sequence[int], out: Tensor) -> Tensor:
        return self._product(rows, self._from_long, chosen, out)

    @staticmethod
    def _product(rows: Tensor, matrices: Tensor, chosen: Sequence[int], out: Tensor) -> Tensor:
        for part in runs(chosen):
            torch.bmm(rows[part], matrices[part], out=out[part])
        return out


def runs(chosen: Sequence[int]) -> list[slice]:
    """Ascending indices as slices: matrices that are done are left out without copying the others."""
    parts: list[slice] = []
    for index in chosen:
        if parts and parts[-1].stop == index:
            parts[-1] = slice(parts[-1].start, index + 1)
        else:
            parts.append(slice(index, index + 1))
    return parts


class KrylovSpaces:
    """The Krylov spaces of a batch. basis: orthonormal rows on the short side; images = basis · A in float64; gram = images · imagesᵀ."""

    def __init__(self, count: int, capacity: int, width: int, short: int, long: int, device: torch.device) -> None:
        self._basis = torch.zeros(count, capacity, short, device=device)
        self._images = torch.zeros(count, capacity, long, dtype=torch.float64, device=device)
        self._gram = torch.zeros(count, capacity, capacity, dtype=torch.float64, device=device)
        # Zeros, not empty: rows of matrices that are done, or were never chosen, stay finite.
        self.short_rows = torch.zeros(count, width, short, device=device)
        self.long_rows = torch.zeros(count, width, long, device=device)
        self.size = 0

    @property
    def gram(self) -> Tensor:
        return self._gram[:, : self.size, : self.size]

    def add(self, block: Tensor, image: Tensor) -> None:
        width = block.shape[1]
        old, new = self.size, self.size + width
        self._basis[:, old:new] = block
        self._images[:, old:new] = image
        cross = self._images[:, :new] @ self._images[:, old:new].mT
        self._gram[:, :new, old:new] = cross
        self._gram[:, old:new, :new] = cross.mT
        self.size = new

    def without(self, block: Tensor) -> Tensor:
        """`block` made orthogonal to the basis; twice, because once leaves cancellation errors."""
        basis = self._basis[:, : self.size]
        for _ in range(2):
            block = torch.baddbmm(block, block @ basis.mT, basis, alpha=-1)
        return block

    def vectors(self, index: int, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Singular triplets of one matrix from its leading Ritz vectors (k, size) on the host: inner rows, values, outer rows."""
        chosen = to_device(rotation.contiguous(), self._basis.device)
        inner = chosen.float() @ self._basis[index, : self.size]
        outer = chosen @ self._images[index, : self.size]
        values = outer.norm(dim=1)
        return inner, values, (outer / values[:, None]).float()

    def restart(self, leading: dict[int, Tensor]) -> None:
        """Thick restart: the leading Ritz vectors (keep, size) of each matrix that goes on stay."""
        keep = next(iter(leading.values())).shape[0]
        kept = torch.zeros(self._basis.shape[0], keep, self.size, dtype=torch.float64)
        for index, rotation in leading.items():
            kept[index] = rotation
        rotation = to_device(kept, self._basis.device)
        basis, images = rotation.float() @ self._basis[:, : self.size], rotation @ self._images[:, : self.size]
        self._basis[:, :keep], self._images[:, :keep] = basis, images
        self._gram.zero_()
        self._gram[:, :keep, :keep] = images @ images.mT
        self.size = keep


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on `device`, without waiting for what the device is doing."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
