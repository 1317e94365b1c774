"""What an inspection says of one matrix or vector: the fields of the JSON (docs/inspect.md) as attributes, None where undefined."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

Interval = tuple[float, float]
"""Low and high."""


class Result:
    """A part of a result. Where one is read from JSON, NaN and Inf are refused, and fields that are not named here are left alone."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"allow_inf_nan": False}


@dataclass(frozen=True)
class Certificate(Result):
    """How well the singular directions are known; see docs/manifest.md. passes: products with the matrix that were spent."""

    method: str
    residual: float | None
    next_singular_value: float | None
    angle_bound: float | None
    projection_error_bound: float | None
    ambiguous: bool
    passes: int


@dataclass(frozen=True)
class Chance(Result):
    """What random subspaces give: expectation, and 95 % of them."""

    expected: float | None
    band: Interval | None


@dataclass(frozen=True)
class Cosines(Result):
    """Cosines of a fine-tuning update Δ_ft, None where it is zero.

    update_to_alignment: with Δ_align. safety_angle: with −Δ_align; 1 walks straight back. band: 95 % of random directions for these two,
    whose expectation is 0. update_to_total: with Δ_align + Δ_ft; with what an update as long in a random direction gives.
    """

    update_to_total: float | None
    update_to_total_expected: float | None
    update_to_total_band: Interval | None
    update_to_alignment: float | None
    safety_angle: float | None
    band: Interval | None


@dataclass(frozen=True)
class Spectrum(Result):
    """Singular values at some indices (from 1). computed: how many of all (`of`) are known; complete: all are."""

    index: tuple[int, ...] = field(repr=False)
    values: tuple[float, ...] = field(repr=False)
    computed: int
    of: int
    complete: bool


@dataclass(frozen=True)
class EffectiveRanks(Result):
    """How many directions a change acts in: the fewest for 50, 90, 99 % of its energy; stable rank; participation ratio."""

    energy_50: int | None
    energy_90: int | None
    energy_99: int | None
    stable: float | None
    participation: float | None


@dataclass(frozen=True)
class MatrixEnergyKept(Result):
    """Share of ‖Δ‖² that k directions of Δ_align hold, k being this fraction of the short side: top: the leading ones.

    random: random subspaces. random_k: as many directions of Δ_align drawn at random; None where not all of them were computed.
    """

    fraction: float
    k: int
    top: float | None
    random: Chance | None
    random_k: Chance | None


@dataclass(frozen=True)
class MatrixOverlap(Result):
    """MSO of Δ_align and Δ_ft at the energy eta, what random subspaces give, and how many directions hold it in each."""

    eta: float
    mso: float | None
    expected: float | None
    k_align: int | None
    k_ft: int | None


@dataclass(frozen=True)
class PairOverlap(Result):
    """The same of two fine-tuned models' changes."""

    eta: float
    mso: float | None
    expected: float | None
    k_first: int | None
    k_second: int | None


@dataclass(frozen=True)
class MatrixPair(Result):
    """Overlap of two fine-tuned models' changes of a matrix; first, second: places in the list of labels."""

    first: int
    second: int
    mso: tuple[PairOverlap, ...]


@dataclass(frozen=True)
class AlignedMatrix(Result):
    """Alignment's change of one matrix. norm: ‖Δ‖ in units of the weights; relative_norm: by ‖W_align‖; r: R_align (LoX, Eq. 1).

    r_expected: √(k/d). noise_edge: singular values below it may be rounding alone. undecided: why values are None that more singular
    values would decide.
    """

    norm: float
    relative_norm: float | None
    r: float | None
    r_expected: float | None
    energy_kept: tuple[MatrixEnergyKept, ...]
    spectrum: Spectrum
    noise_edge: float | None
    noise_floor_rank: int | None
    effective_ranks: EffectiveRanks
    certificate: Certificate | None
    undecided: str | None


@dataclass(frozen=True)
class FinetunedMatrix(AlignedMatrix):
    """One fine-tuned model's change of one matrix. r: R_ft (LoX, Eq. 2); ratio: R_ft/R_align, ratio_random: in random subspaces."""

    ratio: float | None
    ratio_random: Chance | None
    cosines: Cosines
    mso: tuple[MatrixOverlap, ...]


@dataclass(frozen=True)
class Matrix(Result):
    """One matrix; the fine-tuned models in the order of the labels.

    part: of a stacked tensor, such as '[3].gate', else ''. shape: (d_out, d_in) of the map. transposed: stored as (d_in, d_out).
    """

    name: str
    part: str
    shape: tuple[int, int]
    transposed: bool
    layer: str | None
    kind: str
    linear: bool
    vocabulary: bool
    k: int | None
    aligned: AlignedMatrix
    finetuned: tuple[FinetunedMatrix, ...]
    pairs: tuple[MatrixPair, ...]

    @property
    def full_name(self) -> str:
        """The tensor's name with the part of it."""
        return self.name + self.part


@dataclass(frozen=True)
class AlignedVector(Result):
    """Alignment's change of a vector: ‖Δ‖, and ‖Δ‖/‖w_align‖."""

    norm: float
    relative_norm: float | None


@dataclass(frozen=True)
class FinetunedVector(AlignedVector):
    """One fine-tuned model's change of a vector."""

    cosines: Cosines


@dataclass(frozen=True)
class Vector(Result):
    """A tensor of fewer than two dimensions; it enters norms and cosines of its layer and of the whole."""

    name: str
    layer: str | None
    entries: int
    aligned: AlignedVector
    finetuned: tuple[FinetunedVector, ...]
