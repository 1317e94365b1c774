"""How large the singular values are that rounding to the stored forms of two models leaves in their difference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lox_merge.checkpoint.adapter import AdaptedCheckpoint
from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.jobs.layout import MatrixView
from lox_merge.jobs.quantised import grid_of
from lox_merge.maths.grid import Grid
from lox_merge.maths.precision import noise_edge, rounding_noise_edge, rounding_variance


@dataclass(frozen=True)
class RoundingNoise:
    """Of one matrix. earlier, later: what its weights are rounded to; None where they are of a plain dtype.

    Plain weights were trained from the earlier model's as they are stored, so that the later model's rounding alone is noise. Models that
    were quantised were not trained from one another in that form: the error of either is.
    """

    earlier: Grid | None = None
    later: Grid | None = None

    def edge(self, earlier: Tensor, later: Tensor, norm: float) -> float:
        """earlier, later: (rows, columns) as they are read; norm: of their difference, which noise cannot exceed. See `noise_edge`."""
        if self.earlier is None and self.later is None:
            return rounding_noise_edge(later)
        variance = rounding_variance(later) if self.later is None else self.later.to(later.device).rounding_variance(later)
        if self.earlier is not None:
            variance += self.earlier.to(earlier.device).rounding_variance(earlier)
        # Steps wider than the change cross few borders: what is left of their noise is in the difference.
        return noise_edge(min(variance, norm**2 / max(1, later.numel())), later.shape)


PLAIN = RoundingNoise()


def noise_between(earlier: tuple[Checkpoint, str], later: tuple[Checkpoint, str], view: MatrixView) -> RoundingNoise:
    """Of one matrix of two models. earlier, later: the model and the tensor's name in it. Reads scales."""
    if isinstance(later[0], AdaptedCheckpoint):
        return PLAIN  # what an adapter adds is not rounded to its base's form
    return RoundingNoise(grid_of(*earlier, view), grid_of(*later, view))
