"""Per-example gradients of one parameter from what a backward pass leaves behind, and their inner products.

A linear map y = W x on the rows s of example i has the gradient G_i = Σ_s δ_s x_sᵀ with δ = ∂/∂y. Nothing here keeps more of G_i
than a block of its rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Outer:
    """Rows of a linear map. inputs: (r, d_in). gradients: (r, d_out). owners: (r,) int64, ascending: the example of each row.

    slot: which matrix of a stack. transposed: the parameter is stored as (d_in, d_out).
    """

    inputs: Tensor
    gradients: Tensor
    owners: Tensor
    slot: int | None = None
    transposed: bool = False

    @property
    def bytes(self) -> int:
        return self.inputs.nbytes + self.gradients.nbytes


@dataclass(frozen=True)
class Lookup:
    """Rows of an embedding. tokens: (r,) int64. gradients: (r, d). owners: as in Outer."""

    tokens: Tensor
    gradients: Tensor
    owners: Tensor

    @property
    def bytes(self) -> int:
        return self.gradients.nbytes


@dataclass(frozen=True)
class Whole:
    """Rows of the gradients themselves. values: (b, rows, columns), one column for a vector. owners: (b,) int64, ascending."""

    values: Tensor
    owners: Tensor

    @property
    def bytes(self) -> int:
        return self.values.nbytes


Contribution = Outer | Lookup | Whole
# Memory for a tensor of this shape and dtype on this device.
Place = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]


def wide(tensor: Tensor) -> Tensor:
    """float32, or float64 where it is that already: sums of narrower types would drift."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def narrowed(found: Contribution, first: int, last: int) -> Contribution:
    """What is needed of it for the parameter's rows first, …, last − 1 (rows are outputs, or tokens); may share memory with it."""
    if isinstance(found, Outer):
        return replace(found, gradients=found.gradients[:, first:last])
    if isinstance(found, Lookup):
        kept = (found.tokens >= first) & (found.tokens < last)
        return Lookup(found.tokens[kept] - first, found.gradients[kept], found.owners[kept])
    return Whole(found.values[:, first:last], found.owners)


def inner_products(found: Contribution, direction: Tensor, examples: int) -> Float[Tensor, " n"]:
    """(n,) float64: ⟨g_i, D⟩ of every example; 0 for examples that own no row.

    direction: D in the parameter's own shape and layout (of a stack: the whole stack).
    """
    if isinstance(found, Outer):
        matrix = direction if found.slot is None else direction[found.slot]
        matrix = wide(matrix.T if found.transposed else matrix)
        dtype = torch.promote_types(matrix.dtype, found.inputs.dtype)
        rows = ((found.inputs.to(dtype) @ matrix.to(dtype).T) * found.gradients.to(dtype)).sum(-1)
    elif isinstance(found, Lookup):
        rows = (wide(found.gradients) * wide(direction[found.tokens])).sum(-1)
    else:
        rows = (wide(found.values).flatten(1) * wide(direction).reshape(1, -1)).sum(-1)
    out = torch.zeros(examples, dtype=torch.float64, device=rows.device)
    return out.index_add_(0, found.owners, rows.double())


def add_weighted_sums(out: Tensor, found: Contribution, weights: Float[Tensor, "n k"]) -> None:
    """out[j] += Σ_i weights_ij g_i. out: (k, *the parameter's shape), float32 or wider. weights: (n, k), float64."""
    shares = weights.to(device=out.device, dtype=out.dtype)[found.owners]
    for place, target in enumerate(out):
        share = shares[:, place, None]
        if isinstance(found, Outer):
            matrix = target if found.slot is None else target[found.slot]
            (matrix.T if found.transposed else matrix).addmm_((found.gradients.to(out.dtype) * share).T, found.inputs.to(out.dtype))
        elif isinstance(found, Lookup):
            target.index_add_(0, found.tokens, found.gradients.to(out.dtype) * share)
        else:
            target += (found.values.to(out.dtype) * share[:, :, None]).sum(0).view(target.shape)


def gradient_rows(
    found: Sequence[Contribution], first: int, last: int, columns: int, owners: Int[Tensor, " b"], place: Place | None = None
) -> Float[Tensor, "b rows columns"]:
    """(b, last − first, columns), float32 or wider: these rows of G_i for the examples `owners` (ascending), zero where it has none.

    Row numbers count from the first row that `found` was narrowed to. place: gives memory of this shape, whatever it holds.
    """
    values = [some.values if isinstance(some, Whole) else some.gradients for some in found]
    dtype = functools.reduce(torch.promote_types, (value.dtype for value in values), torch.float32)
    shape, device = (len(owners), last - first, columns), values[0].device
    out = torch.empty(shape, dtype=dtype, device=device) if place is None else place(shape, dtype, device)
    empty = set(range(len(owners)))
    for some in found:
        _add_rows(out, some, first, last, owners, empty)
    for number in empty:
        out[number].zero_()
    return out


def _add_rows(out: Tensor, found: Contribution, first: int, last: int, owners: Tensor, empty: set[int]) -> None:
    """In place: one batch of many owns few of the rows, and a block of its own for each would cost more than the products.

    empty: places in `out` to which nothing was written so far; products begin there, which spares zeros one trip through memory.
    """
    places = torch.searchsorted(owners, found.owners)
    if not isinstance(found, Outer):
        for place in empty:
            out[place].zero_()
        empty.clear()
    if isinstance(found, Whole):
        out.index_add_(0, places, found.values[:, first:last].to(out.dtype))
    elif isinstance(found, Lookup):
        kept = (found.tokens >= first) & (found.tokens < last)
        out.index_put_((places[kept], found.tokens[kept] - first), found.gradients[kept].to(out.dtype), accumulate=True)
    else:
        gradients, inputs = found.gradients[:, first:last].to(out.dtype), found.inputs.to(out.dtype)
        own, counts = torch.unique_consecutive(places, return_counts=True)
        parts = counts.tolist()
        for place, some, others in zip(own.tolist(), torch.split(gradients, parts), torch.split(inputs, parts), strict=True):
            out[place].addmm_(some.T, others, beta=0 if place in empty else 1)
            empty.discard(place)


def pair_gram(gradients: Outer, examples: int, most_rows: int = 1024) -> Float[Tensor, "n n"]:
    """(n, n) float64: ⟨G_i, G_j⟩ = Σ_{s,t} (x_is·x_jt)(δ_is·δ_jt), without any gradient; r²(d_in + d_out) multiplications."""
    inputs, deltas = wide(gradients.inputs), wide(gradients.gradients)
    gram = torch.zeros(examples, examples, dtype=torch.float64, device=inputs.device)
    for start in range(0, len(inputs), most_rows):
        piece = slice(start, start + most_rows)
        products = (inputs[piece] @ inputs.T).mul_(deltas[piece] @ deltas.T).double()
        across = torch.zeros(len(products), examples, dtype=torch.float64, device=inputs.device).index_add_(1, gradients.owners, products)
        gram.index_add_(0, gradients.owners[piece], across)
    return gram


def pairs_are_cheaper(rows: int, examples: int, inputs: int, outputs: int) -> bool:
    """Whether `pair_gram` multiplies less than forming the gradients by blocks: r²(d_in+d_out) against (r + n²) d_in d_out."""
    return rows**2 * (inputs + outputs) < (rows + examples**2) * inputs * outputs
