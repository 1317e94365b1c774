"""What the singular values alone say about a rank: the share of the delta it keeps, and where rounding noise begins."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch

from lox_merge.jobs.factors import Factors


@dataclass(frozen=True)
class Spectra:
    """Singular values of every decomposed matrix whose delta is not zero.

    values: one (k,) float64 tensor per matrix, descending; norms: ||Delta||_F; edges: largest singular value that rounding
    of the aligned weights alone would give; complete: whether no further direction exists.
    """

    values: tuple[torch.Tensor, ...]
    norms: tuple[float, ...]
    edges: tuple[float, ...]
    complete: tuple[bool, ...]

    def mean_ratio(self, rank: int) -> float | None:
        """Mean over matrices of R_align = ||Proj_r(Delta)||/||Delta||; None without matrices."""
        if not self.values:
            return None
        ratios = (min(1.0, float(values[:rank].norm()) / norm) for values, norm in zip(self.values, self.norms, strict=True))
        return math.fsum(ratios) / len(self.values)

    def energy_ratio(self, rank: int) -> float | None:
        """R_align of all matrices together: sqrt(sum ||Proj_r(Delta)||² / sum ||Delta||²); None without matrices."""
        if not self.values:
            return None
        kept = math.fsum(float(values[:rank].square().sum()) for values in self.values)
        return min(1.0, math.sqrt(kept / math.fsum(norm**2 for norm in self.norms)))

    def noise_floor(self) -> NoiseFloor:
        """How many directions stand above the rounding noise of the stored dtype: an upper bound for a useful rank."""
        above = [int((values > edge).sum()) for values, edge in zip(self.values, self.edges, strict=True)]
        known = [count < len(values) or complete for count, values, complete in zip(above, self.values, self.complete, strict=True)]
        if not above:
            return NoiseFloor(None, None, None, 0)
        # Unknown counts are at least what is held, so a median below every one of them is exact all the same.
        median = statistics.median_low(above)
        least_unknown = min((count for count, sure in zip(above, known, strict=True) if not sure), default=None)
        exact = least_unknown is None or median < least_unknown
        return NoiseFloor(median if exact else None, min(above), max(above) if all(known) else None, known.count(False))


@dataclass(frozen=True)
class NoiseFloor:
    """Ranks above rounding noise over all matrices. None where more triplets than are held would be needed to tell.

    open: matrices whose every held direction stands above the noise.
    """

    median: int | None
    smallest: int | None
    largest: int | None
    open: int


def spectra_of(factors: Factors) -> Spectra:
    """The spectra in a file of factors, without matrices whose delta is zero."""
    records = [record for record in factors.matrices.values() if record.norm > 0]
    return Spectra(
        values=tuple(factors.subspace(record.name, record.part).singular_values for record in records),
        norms=tuple(record.norm for record in records),
        edges=tuple(record.noise_edge for record in records),
        complete=tuple(record.complete for record in records),
    )
