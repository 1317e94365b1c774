"""Memory for what outlives one backward pass, apart from what comes and goes in it."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lox_merge.maths.gradients import Contribution, Lookup, Outer, Whole

# Of an allocation beside the first.
_CHUNK = 64 * 2**20
_ALIGNED = 64


class Scratch:
    """One allocation (of each device) for tensors that are needed one after another: fresh memory can cost more than what is put into it."""

    def __init__(self, size: int) -> None:
        """size: bytes; a larger tensor gets memory of its own."""
        self.size = size
        self._memory: dict[torch.device, Tensor] = {}

    def place(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Of this shape, holding anything; overwritten by the next call."""
        needed = math.prod(shape) * dtype.itemsize
        if needed > self.size:
            return torch.empty(shape, dtype=dtype, device=device)
        if device not in self._memory:
            self._memory[device] = torch.empty(self.size, dtype=torch.uint8, device=device)
        return self._memory[device][:needed].view(dtype).view(shape)


@dataclass
class _Chunk:
    memory: Tensor
    used: int = 0

    @property
    def left(self) -> int:
        return self.memory.numel() - self.used


class Arena:
    """Copies tensors into one allocation (of each device), which `clear` leaves for the next ones.

    Thousands of tensors of a megabyte that stay, allocated between others that go, leave holes into which the next backward pass does not
    fit: the heap would grow to a multiple of what is in use, with every completion.
    """

    def __init__(self, expected: int = _CHUNK, device: torch.device | None = None) -> None:
        """expected: bytes that the tensors are going to take together; more of them are kept, too. On a CPU memory is taken when it is used.

        device: where to keep them, if not where they are.
        """
        self._expected, self._device = expected, device
        self._chunks: dict[torch.device, list[_Chunk]] = {}
        self._copies: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    @property
    def used(self) -> int:
        """Bytes in use."""
        return sum(chunk.used for chunks in self._chunks.values() for chunk in chunks)

    def keep(self, found: Contribution) -> Contribution:
        """The same with its tensors in here; a tensor that several contributions share is kept once."""
        kept = self._kept
        if isinstance(found, Outer):
            return replace(found, inputs=kept(found.inputs), gradients=kept(found.gradients), owners=kept(found.owners))
        if isinstance(found, Lookup):
            return Lookup(kept(found.tokens), kept(found.gradients), kept(found.owners))
        return Whole(kept(found.values), kept(found.owners))

    def clear(self) -> None:
        """What was kept is overwritten from now on."""
        self._copies.clear()
        for chunks in self._chunks.values():
            for chunk in chunks:
                chunk.used = 0

    def _kept(self, tensor: Tensor) -> Tensor:
        of, copy = self._copies.get(id(tensor), (None, tensor))
        if of is None or of() is not tensor:
            copy = self._place(tensor)
            self._copies[id(tensor)] = (weakref.ref(tensor), copy)
        return copy

    def _place(self, tensor: Tensor) -> Tensor:
        device = self._device or tensor.device
        chunks = self._chunks.setdefault(device, [])
        chunk = next((chunk for chunk in chunks if chunk.left >= tensor.nbytes), None)
        if chunk is None:
            size = _CHUNK if chunks else self._expected
            chunk = _Chunk(torch.empty(max(size, tensor.nbytes), dtype=torch.uint8, device=device))
            chunks.append(chunk)
        place = chunk.memory[chunk.used : chunk.used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        chunk.used = min(chunk.memory.numel(), -(-(chunk.used + tensor.nbytes) // _ALIGNED) * _ALIGNED)
        return place.copy_(tensor)
