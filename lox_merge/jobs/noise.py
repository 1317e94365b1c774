"""How large the singular values are that rounding to the stored forms of two models leaves in their difference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lox_merge.checkpoint.adapter import AdaptedCheckpoint
from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.checkpoint.quantised.view import QuantisedCheckpoint
from lox_merge.jobs.layout import MatrixView
from lox_merge.jobs.select import TensorPlan
from lox_merge.maths.grid import Grid
from lox_merge.maths.precision import rounding_noise_edge, rounding_variance


@dataclass(frozen=True)
class RoundingNoise:
    """Of one matrix. earlier, later: what its weights are rounded to; None where they are of a plain dtype.

    Plain weights were trained from the earlier model's as they are stored, so that the later model's rounding alone is noise. Models that
    were quantised were not trained from one another in that form: the error of either is.
    """

    earlier: Grid | None = None
    later: Grid | None = None

    def edge(self, earlier: Tensor, later: Tensor, delta: Tensor) -> float:
        """Singular value below which a direction of `delta` may be rounding alone.

        earlier, later: (rows, columns) as they are read; delta: their difference, float32. Rounding to a plain dtype is about as large
        everywhere: see `rounding_noise_edge`. Codes and scales are not, and steps wider than the change leave few entries that differ by
        much each, so that the longest row and the longest column decide: noise of independent entries has a norm of about the sum of their
        lengths (Bandeira & van Handel 2016, Annals of Probability 44(4)). Neither is longer than in the difference itself.
        """
        if self.earlier is None and self.later is None:
            return rounding_noise_edge(later)
        if later.numel() == 0:
            return 0.0
        rows, columns = later.shape
        by_row, by_column = (torch.zeros(side, dtype=torch.float64, device=later.device) for side in (rows, columns))
        if self.later is None:
            by_row += columns * rounding_variance(later)
            by_column += rows * rounding_variance(later)
        for grid, values in ((self.earlier, earlier), (self.later, later)):
            if grid is not None:
                for total, part in zip((by_row, by_column), grid.to(values.device).rounding_variance(values), strict=True):
                    total += part
        lengths = 0.0
        for variances, axis in ((by_row, 1), (by_column, 0)):
            there = torch.linalg.vector_norm(delta, dim=axis).double().square()
            lengths += math.sqrt(float(torch.minimum(variances, there).max()))
        return lengths


PLAIN = RoundingNoise()


def grid_of(checkpoint: Checkpoint | None, name: str, view: MatrixView) -> Grid | None:
    """The values that one matrix of a quantised checkpoint can hold with the scales that it has; None where it is not quantised."""
    found = checkpoint.grid(name, view.expert) if isinstance(checkpoint, QuantisedCheckpoint) else None
    if found is None or view.part is None:
        return found
    piece, every = slice(*view.part), slice(None)
    return found.part(piece, every) if view.axis == 0 else found.part(every, piece)


def noise_between(earlier: tuple[Checkpoint, str], later: tuple[Checkpoint, str], view: MatrixView) -> RoundingNoise:
    """Of one matrix of two models. earlier, later: the model and the tensor's name in it. Reads scales."""
    if isinstance(later[0], AdaptedCheckpoint):
        return PLAIN  # what an adapter adds is not rounded to its base's form
    return RoundingNoise(grid_of(*earlier, view), grid_of(*later, view))


@dataclass(frozen=True)
class PairNoise:
    """Of the matrices of a pair."""

    base: Checkpoint
    aligned: Checkpoint

    def of(self, tensor: TensorPlan, view: MatrixView) -> RoundingNoise:
        """Reads scales."""
        return noise_between((self.base, tensor.name_in("base")), (self.aligned, tensor.name_in("aligned")), view)
