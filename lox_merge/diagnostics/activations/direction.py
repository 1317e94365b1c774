"""The alignment direction of a set of responses: mean states of base and aligned, added up text by text, and what is projected on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from lox_merge.maths.activations import scalar_projection, swapped_norm

FOLDS = 5


def folds_of(count: int, seed: int) -> list[int]:
    """The fold of each text, a seeded draw of parts that differ by one text at most. All 0 for a single text, which has no others."""
    order = numpy.random.default_rng(seed).permutation(count)
    found = numpy.empty(count, dtype=int)
    found[order] = numpy.arange(count) % min(FOLDS, count)
    return [int(fold) for fold in found]


class Sums:
    """Σ z of one model by fold, layer and position, (folds, layers, positions, width) float64."""

    def __init__(self, folds: int, layers: int, positions: int, width: int) -> None:
        self.sums = torch.zeros(folds, layers, positions, width, dtype=torch.float64)

    def add(self, fold: int, states: Tensor) -> None:
        """states: (layers, positions the text has, width)."""
        self.sums[fold, :, : states.shape[1]] += states.double()


class Direction:
    """v_l = μ_aligned − μ_base at each layer and position, over the texts that have it; and the same without each fold's texts.

    base, aligned: sums of both models, which are used up. lengths: positions of each text. folds: of each text.
    swapped: √E‖v_l‖² if a coin had swapped base and aligned in each text, a number a layer.
    """

    def __init__(self, base: Sums, aligned: Sums, lengths: Sequence[int], folds: Sequence[int]) -> None:
        self._folds, self._lengths = folds, lengths
        positions = base.sums.shape[2]
        self.counts = torch.zeros(base.sums.shape[0], positions, dtype=torch.float64)
        for length, fold in zip(lengths, folds, strict=True):
            self.counts[fold, :length] += 1
        counts = self.counts.sum(0)
        self.base_mean = base.sums.sum(0) / counts[:, None]
        self._difference = aligned.sums.sub_(base.sums)
        self.swapped = [swapped_norm(self._difference[:, layer], self.counts) for layer in range(self._difference.shape[1])]
        self._sum = self._difference.sum(0)
        self.mean = self._sum / counts[:, None]

    @property
    def norms(self) -> list[float]:
        """‖v_l‖ of each layer."""
        return [float(norm) for norm in torch.linalg.vector_norm(self.mean.flatten(1), dim=1)]

    @property
    def dimension(self) -> int:
        return int(self.mean.shape[1] * self.mean.shape[2])

    def project(self, number: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """Scalar projections of a text's states on v_l, and on v_l of the other folds' texts; (layers,) each, NaN where undefined."""
        length, fold = states.shape[1], self._folds[number]
        counts = (self.counts.sum(0) - self.counts[fold])[:length, None]
        others = (self._sum - self._difference[fold])[:, :length] / counts.clamp_min(1)  # a position nobody else has is 0
        return scalar_projection(states, self.mean[:, :length]), scalar_projection(states, others)


class Projected:
    """Projections of one model on a direction, text by text: (texts, layers) float64; and the mean of its states, for what lies off the line."""

    def __init__(self, direction: Direction, texts: int) -> None:
        self._direction = direction
        layers, positions, width = direction.mean.shape
        self.inside = torch.full((texts, layers), torch.nan, dtype=torch.float64)
        self.outside = torch.full((texts, layers), torch.nan, dtype=torch.float64)
        self._total = torch.zeros(layers, positions, width, dtype=torch.float64)

    def add(self, number: int, states: Tensor) -> None:
        self.inside[number], self.outside[number] = self._direction.project(number, states)
        self._total[:, : states.shape[1]] += states.double()

    def off_line(self) -> list[float | None]:
        """Distance of the model's mean from the line through base's and aligned's, in units of ‖v_l‖; None where v_l = 0."""
        along = self._direction.mean.flatten(1)
        moved = (self._total / self._direction.counts.sum(0)[:, None] - self._direction.base_mean).flatten(1)
        squares = along.square().sum(1)
        share = torch.linalg.vecdot(moved, along) / squares
        rest = torch.linalg.vector_norm(moved - share[:, None] * along, dim=1) / squares.sqrt()
        return [None if not square else float(value) for value, square in zip(rest, squares, strict=True)]
