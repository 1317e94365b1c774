"""Subspaces of the hidden states of prompt sets, per layer, and their overlaps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy
from torch import Tensor

from lox_merge.diagnostics.activations.results import Overlap, SetOverlap
from lox_merge.maths.activations import Leading
from lox_merge.maths.geometry import expected_overlap, leading_count, mode_subspace_overlap, squared_overlaps
from lox_merge.maths.scatter import Scatter


class SetStates:
    """Last-token states of one prompt set under one model, added up per layer in two random halves (seeded: the same for every model)."""

    def __init__(self, prompts: int, layers: Sequence[int], width: int, seed: int) -> None:
        self._second = numpy.random.default_rng(seed).permutation(prompts) % 2
        self._halves = [[Scatter(width) for _ in range(2)] for _ in layers]

    def add(self, number: int, states: Tensor) -> None:
        """states: (layers, width) of one prompt."""
        for halves, state in zip(self._halves, states, strict=True):
            halves[int(self._second[number])].add(state[None])

    def leading(self, layer: int, *, centred: bool) -> tuple[Leading, list[Leading]]:
        """Of the whole set, and of each half. layer: its place among the layers."""
        halves = self._halves[layer]
        return (halves[0] + halves[1]).leading(centred=centred), [half.leading(centred=centred) for half in halves if half.count]


def overlaps(model: str, names: Sequence[str], sets: Sequence[SetStates], layers: Sequence[int], etas: Sequence[float]) -> list[SetOverlap]:
    """Every two sets at every layer."""
    found = []
    for place, layer in enumerate(layers):
        swept = []
        for centred in (False, True):
            wholes, halves = zip(*(states.leading(place, centred=centred) for states in sets), strict=True)
            inner = [_inside(two, etas) for two in halves]
            swept.append((wholes, inner))
        for i, j in itertools.combinations(range(len(names)), 2):
            curves = [_curve(wholes[i], wholes[j], inner[i], inner[j], etas) for wholes, inner in swept]
            found.append(SetOverlap(model, layer, names[i], names[j], *curves))
    return found


_Point = tuple[tuple[int, int] | None, float | None]


def _curve(first: Leading, second: Leading, inside: list[_Point], others: list[_Point], etas: Sequence[float]) -> tuple[Overlap, ...]:
    width = first.directions.shape[0]
    return tuple(
        Overlap(eta, counts, mso, None if counts is None else expected_overlap(*counts, width), (one[1], other[1]))
        for eta, (counts, mso), one, other in zip(etas, _sweep(first, second, etas), inside, others, strict=True)
    )


def _inside(halves: Sequence[Leading], etas: Sequence[float]) -> list[_Point]:
    return _sweep(halves[0], halves[1], etas) if len(halves) == 2 else [(None, None) for _ in etas]


def _sweep(first: Leading, second: Leading, etas: Sequence[float]) -> list[_Point]:
    """(k_A, k_B) and MSO at each η; None where a set has no energy (one prompt without its mean)."""
    products = squared_overlaps(first.directions, second.directions)
    found: list[_Point] = []
    for eta in etas:
        counts = leading_count(first.squares, first.total, eta), leading_count(second.squares, second.total, eta)
        if counts[0] is None or counts[1] is None:
            found.append((None, None))
        else:
            both = (counts[0], counts[1])
            found.append((both, min(1.0, mode_subspace_overlap(products, *both))))
    return found
