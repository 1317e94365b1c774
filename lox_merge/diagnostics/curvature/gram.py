"""Inner products ⟨g_i, g_j⟩ of the gradients of all completions, parameter by parameter, exact and within a memory limit."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lox_merge.diagnostics.curvature.arena import Arena, Scratch
from lox_merge.diagnostics.curvature.passes import Measured, Piece, kept_bytes, plan_passes, planned_bytes
from lox_merge.diagnostics.curvature.sites import Site, find_sites, selected
from lox_merge.diagnostics.curvature.walk import Example, Reduction, check_examples, check_model, kept_rows, walk
from lox_merge.errors import RequestError
from lox_merge.maths.gradients import Contribution, Lookup, Outer, Whole, gradient_rows, narrowed, pair_gram, pairs_are_cheaper
from lox_merge.maths.precision import full_precision_matmul
from lox_merge.safety.progress import ProgressFactory, no_progress

MEMORY = 2 * 2**30
"""Bytes that inputs and gradients may take beside the model, unless told otherwise."""
# Of the memory, for gradients that are formed at the end of a pass.
_SCRATCH = 8
# Bytes of gradients formed at once: what a processor's cache may still hold when their products are taken. Fewer rows than these cost
# more in calls than the cache saves.
_BLOCK, _BLOCK_ROWS = 32_000_000, 128
_WIDE = 4  # bytes of a float32

# Told the rows (n, rows, columns) of all gradients of a parameter, once for each block: name, first row, gradients.
RowsSeen = Callable[[str, int, Tensor], None]


@dataclass(frozen=True)
class FisherGram:
    """grams: parameter name → (n, n) float64 on the CPU, ⟨g_i, g_j⟩, not divided by N. sizes: entries of each parameter.

    left_out: reason by name of each parameter whose gradients are not in. passes: over the completions. rows: (d_out, d_in) of the
    matrices; (length, 1) of vectors. tokens: that predict or are predicted, of all completions. sites: for further walks.
    """

    grams: dict[str, Tensor]
    sizes: dict[str, int]
    left_out: dict[str, str]
    examples: int
    tokens: int
    reduction: Reduction
    passes: int
    sites: tuple[Site, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.grams)

    def total(self, names: Sequence[str] | None = None) -> Tensor:
        """⟨g_i, g_j⟩ over several parameters together: F of their joint space, its off-diagonal blocks included."""
        chosen = self.names if names is None else names
        return sum((self.grams[name] for name in chosen), torch.zeros(self.examples, self.examples, dtype=torch.float64))

    def size(self, names: Sequence[str] | None = None) -> int:
        return sum(self.sizes[name] for name in (self.names if names is None else names))


def fisher_gram(
    model: Any,
    examples: Sequence[Example],
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    reduction: Reduction = "sum",
    memory: int = MEMORY,
    batch_size: int | None = None,
    rows_seen: RowsSeen | None = None,
    progress: ProgressFactory = no_progress,
) -> FisherGram:
    """Gradients of log p(response | prompt) of `examples` (see `tokenised`) at the model's weights, which stay as they are.

    wanted: which parameters, by name. memory: bytes beside model and activations; the less, the more passes over the
    completions. rows_seen: is shown every gradient block by block (for projections); it costs the short cut for short texts.
    Raises RequestError: no completions, a quantised model, no such parameter.
    """
    check_model(model)
    check_examples(examples)
    sites, left_out = find_sites(model)
    names = selected(sites, wanted)
    if not names:
        raise RequestError("no parameter is left to measure: the selection names none of the model's. Try --only with another expression.")
    if 8 * len(examples) ** 2 * len(names) > max(memory, MEMORY):
        raise RequestError(
            f"{len(examples):,} completions have {len(examples) ** 2 * len(names):,} inner products, which do not fit. Use fewer (--limit)."
        )
    measured, lost = _first_look(model, sites, names, examples, reduction, batch_size)
    left_out = {name: reason for name, reason in left_out.items() if wanted(name)} | lost
    if not measured:
        raise RequestError("no gradient per completion can be had of the selected parameters: " + "; ".join(sorted(set(left_out.values()))) + ".")
    grams: dict[str, Tensor] = {}
    passes = plan_passes(measured, memory)
    shapes = {parameter.name: parameter for parameter in measured}
    scratch = Scratch(memory // _SCRATCH)
    arena = Arena(max(planned_bytes(pieces, shapes) for pieces in passes))
    for number, pieces in enumerate(passes, 1):
        what = "gradients" if len(passes) == 1 else f"gradients, pass {number} of {len(passes)}"
        store = _Store(pieces, shapes, arena)
        walk(model, sites, store.names, examples, store.emit, reduction=reduction, batch_size=batch_size, progress=progress, what=what)
        with full_precision_matmul(model.device):
            for piece in pieces:
                gram = _gram_of(store.take(piece), piece, shapes[piece.name], len(examples), scratch, rows_seen)
                grams[piece.name] = grams.get(piece.name, 0) + gram.cpu()
    order = [name for name in names if name in grams]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    tokens = sum(len(example["input_ids"]) for example in examples)
    return FisherGram(
        {name: grams[name] for name in order},
        {name: sizes[name] for name in order},
        left_out,
        len(examples),
        tokens,
        reduction,
        len(passes),
        tuple(sites),
    )


class _Store:
    """What one pass keeps, by piece."""

    def __init__(self, pieces: Sequence[Piece], shapes: dict[str, Measured], arena: Arena) -> None:
        """arena: of which nothing is in use any more."""
        self._pieces, self._shapes, self.arena = {piece.name: piece for piece in pieces}, shapes, arena
        arena.clear()
        self.names = set(self._pieces)
        self._kept: dict[str, list[Contribution]] = defaultdict(list)

    def emit(self, name: str, found: Contribution) -> None:
        piece, shape = self._pieces[name], self._shapes[name]
        whole = piece.first == 0 and piece.last == shape.rows
        part = found if whole else narrowed(found, piece.first, piece.last)
        if piece.formed and not isinstance(part, Whole):
            owners = torch.unique(part.owners)
            part = Whole(gradient_rows([part], 0, piece.last - piece.first, shape.columns, owners), owners)
        self._kept[name].append(self.arena.keep(part))

    def take(self, piece: Piece) -> list[Contribution]:
        return self._kept.pop(piece.name, [])


def _first_look(
    model: Any, sites: Sequence[Site], names: Sequence[str], examples: Sequence[Example], reduction: Reduction, batch_size: int | None
) -> tuple[list[Measured], dict[str, str]]:
    """Sizes of what a pass would keep, from the shortest completion taken twice; and what cannot be told apart by completion.

    An output head sees responses alone, whose part of a text differs from text to text.
    """
    shortest = min(examples, key=lambda example: len(example["input_ids"]))
    seen: dict[str, list[Contribution]] = defaultdict(list)
    capture = walk(model, sites, set(names), [shortest] * 2, lambda name, found: seen[name].append(found), reduction=reduction, batch_size=2)
    looked, whole = kept_rows(model, [shortest] * 2, 2), kept_rows(model, examples, batch_size)

    def share(found: Contribution) -> float:
        place = 1 if isinstance(found, Outer) and found.slot is None and len(found.owners) == looked[1] < looked[0] else 0
        return whole[place] / looked[place]

    lost = {}
    for site in sites:
        for name in site.parameters.values():
            if name in names and site.name in capture.not_separable:
                lost[name] = f"{type(site.module).__name__} mixes the completions of a batch"
            elif name in names and name not in seen:
                lost[name] = "no gradient reaches it"
    for name in lost:
        seen.pop(name, None)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return [_measured(name, shapes[name], seen[name], len(examples), share) for name in names if name in seen], lost


def _measured(name: str, shape: torch.Size, found: Sequence[Contribution], examples: int, share: Callable[[Contribution], float]) -> Measured:
    """share: how many times a contribution of the first look will come, all batches together."""
    looked_up = int(sum(some.bytes * share(some) for some in found if isinstance(some, Lookup)))
    outer = [some for some in found if isinstance(some, Outer)]
    if outer:
        rows, columns = outer[0].gradients.shape[1], outer[0].inputs.shape[1]
        shared = sum(some.inputs.nbytes * share(some) for some in outer)
        row = sum(some.gradients.nbytes * share(some) for some in outer) / rows
        kept = 0 if outer[0].slot is not None else kept_bytes(columns, examples)
        return Measured(name, rows, columns, id(outer[0].inputs), math.ceil(shared) + looked_up, max(1, math.ceil(row)), kept)
    first = found[0]
    if not isinstance(first, Whole):
        return Measured(name, shape[0], shape[1], id(first), looked_up, 1, kept_bytes(shape[1], examples))
    rows, columns = first.values.shape[1:]
    return Measured(name, rows, columns, id(first), 0, 0, kept_bytes(columns, examples))


def _gram_of(found: Sequence[Contribution], piece: Piece, shape: Measured, examples: int, scratch: Scratch, rows_seen: RowsSeen | None) -> Tensor:
    """(n, n) float64 of the inner products over the piece's rows."""
    outer = [some for some in found if isinstance(some, Outer)]
    slots = sorted({some.slot for some in outer if some.slot is not None})
    if not found:
        return torch.zeros(examples, examples, dtype=torch.float64)
    device = found[0].owners.device
    gram = torch.zeros(examples, examples, dtype=torch.float64, device=device)
    rows = piece.last - piece.first
    if slots:
        for slot in slots:
            _add_gram(gram, [some for some in outer if some.slot == slot], slot * shape.rows + piece.first, rows, shape, scratch, rows_seen)
    else:
        if rows_seen is None and all(isinstance(some, Lookup) for some in found):
            found, rows = _compressed([some for some in found if isinstance(some, Lookup)])
        _add_gram(gram, found, piece.first, rows, shape, scratch, rows_seen)
    return gram


def _add_gram(
    gram: Tensor, found: Sequence[Contribution], first: int, rows: int, shape: Measured, scratch: Scratch, rows_seen: RowsSeen | None
) -> None:
    """Adds one matrix's inner products. first: the number of its first row, for `rows_seen`."""
    owners = torch.unique(torch.cat([some.owners for some in found]))
    outer = [some for some in found if isinstance(some, Outer)]
    only_outer = len(outer) == len(found) and rows_seen is None
    pairs = sum(len(some.owners) for some in outer)
    # They are joined and widened first, which has to fit beside what is kept.
    fit = _WIDE * pairs * (shape.columns + rows) <= scratch.size
    if only_outer and fit and pairs_are_cheaper(pairs, len(owners), shape.columns, rows):
        gram += pair_gram(_joined(outer), len(gram))
        return
    a_row = max(1, kept_bytes(shape.columns, len(owners)))
    step = max(1, min(scratch.size // a_row, max(_BLOCK_ROWS, _BLOCK // a_row)))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        block = gradient_rows(found, start, stop, shape.columns, owners, scratch.place)
        flat = block.flatten(1)
        gram[owners[:, None], owners] += (flat @ flat.T).double()
        if rows_seen is not None:
            whole = block.new_zeros(len(gram), *block.shape[1:])
            whole[owners] = block
            rows_seen(shape.name, first + start, whole)


def _joined(found: Sequence[Outer]) -> Outer:
    return Outer(
        torch.cat([some.inputs for some in found]), torch.cat([some.gradients for some in found]), torch.cat([some.owners for some in found])
    )


def _compressed(found: Sequence[Lookup]) -> tuple[list[Lookup], int]:
    """The same rows numbered by the tokens that occur: the others have no gradient."""
    there = torch.unique(torch.cat([some.tokens for some in found]))
    return [Lookup(torch.searchsorted(there, some.tokens), some.gradients, some.owners) for some in found], len(there)
