"""What an inspection says of a model: the fields of the JSON (docs/inspect.md) as attributes, None where undefined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lox_merge.diagnostics.matrix_results import Cosines, Interval, Matrix, Result, Vector


@dataclass(frozen=True)
class Statistic(Result):
    """A figure over matrices. mean: unweighted; energy: of all energies together.

    expected, band: what random subspaces of the same rank give for the mean, expectation and 95 % of them; expected_energy, band_energy:
    for the energy. matrices: how many enter; undecided: how many do not, because too few singular values were computed.
    """

    mean: float | None
    energy: float | None
    expected: float | None
    band: Interval | None
    expected_energy: float | None
    band_energy: Interval | None
    matrices: int
    undecided: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = dict(self.__dict__)
        for name in ("band", "band_energy"):
            values[name] = None if values[name] is None else list(values[name])
        return values


@dataclass(frozen=True)
class EnergyKept(Result):
    """Share of the energy that a fraction of the directions holds: the leading ones, random subspaces, directions drawn at random."""

    fraction: float
    top: Statistic
    random: Statistic
    random_k: Statistic


@dataclass(frozen=True)
class Overlap(Result):
    """MSO at the energy eta: mean over matrices, and what random subspaces give."""

    eta: float
    mean: float | None
    expected: float | None
    matrices: int
    undecided: int


@dataclass(frozen=True)
class MeanRank(Result):
    """A rank, mean over the matrices that decide it."""

    mean: float | None
    matrices: int
    undecided: int


@dataclass(frozen=True)
class MeanRanks(Result):
    """Effective ranks: directions for 50, 90, 99 % of the energy; stable rank; participation ratio."""

    energy_50: MeanRank
    energy_90: MeanRank
    energy_99: MeanRank
    stable: MeanRank
    participation: MeanRank


@dataclass(frozen=True)
class AlignedGroup(Result):
    """Alignment's change over a group. norm: ‖Δ‖ in units of the weights; relative_norm: by ‖W_align‖; r: R_align."""

    norm: float
    relative_norm: float | None
    r: Statistic
    energy_kept: tuple[EnergyKept, ...]
    effective_ranks: MeanRanks
    noise_floor_rank: MeanRank


@dataclass(frozen=True)
class FinetunedGroup(AlignedGroup):
    """One fine-tuned model's change over a group. r: R_ft; ratio: R_ft/R_align, below 1 where fine-tuning dispersed the alignment."""

    ratio: Statistic
    cosines: Cosines
    mso: tuple[Overlap, ...]


@dataclass(frozen=True)
class Pair(Result):
    """Overlap of two fine-tuned models' changes; first, second: places in the list of labels."""

    first: int
    second: int
    mso: tuple[Overlap, ...]


@dataclass(frozen=True)
class Group(Result):
    """Matrices taken together: the whole model, its linear layers, a layer (of `stack`, with its `number`), a kind.

    vocabulary: a kind of embeddings or output heads. finetuned: in the order of the labels.
    """

    name: str
    stack: str | None
    number: int | None
    vocabulary: bool
    matrices: int
    parameters: int
    aligned: AlignedGroup
    finetuned: tuple[FinetunedGroup, ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Asked(Result):
    """What was asked for, as InspectSettings describes it. factors: a file's name."""

    rank: str
    fractions: tuple[float, ...]
    etas: tuple[float, ...]
    side: str
    full_spectrum: bool
    draws: int
    seed: int
    tolerance: float
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    linear_only: bool
    fused: str
    skip_non_finite: bool
    factors: str | None


@dataclass(frozen=True)
class LeftOut(Result):
    """A tensor that was not compared."""

    name: str
    reason: str


@dataclass(frozen=True)
class Findings(Result):
    """What the weights of a pair and of models fine-tuned from it say.

    labels: names of the fine-tuned models; whatever is called `finetuned` has their order. notes: what belongs beside the figures, in
    sentences. reversals: cos(Δ_ft, −Δ_align) of each over the tensors that it changed; reverting: labels of those where it is at least
    reverting_cosine. whole: every matrix; linear: linear layers alone, as the LoX authors average. seconds: wall time.
    """

    tool: dict[str, Any]
    seconds: float
    device: str
    settings: Asked
    sources: dict[str, Any]
    labels: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    reversals: tuple[float | None, ...]
    reverting: tuple[str, ...]
    reverting_cosine: float
    whole: Group
    linear: Group
    layers: tuple[Group, ...]
    kinds: tuple[Group, ...]
    matrices: tuple[Matrix, ...]
    vectors: tuple[Vector, ...]
    left_out: tuple[LeftOut, ...]

    def __post_init__(self) -> None:
        parts: list[Group | Matrix | Vector] = [self.whole, self.linear, *self.layers, *self.kinds, *self.matrices, *self.vectors]
        for part in parts:
            if len(part.finetuned) != len(self.labels):
                raise ValueError(f"{part.name}: {len(part.finetuned)} entries of finetuned for {len(self.labels)} labels")

    @property
    def titles(self) -> tuple[str, str]:
        """Names of base and aligned."""
        base, aligned = (source_title(self.sources.get(role) or {}) for role in ("base", "aligned"))
        return base, aligned

    @property
    def averaged(self) -> Group:
        """What the authors average: the linear layers; the whole model where it has none."""
        return self.linear if self.linear.matrices else self.whole


def source_title(source: Mapping[str, Any]) -> str:
    """The name of a checkpoint in a document: a folder's own name, or a Hub id with its revision."""
    name = str(source.get("title") or source.get("name") or "unnamed")
    return f"{name}@{source['revision']}" if source.get("revision") and "@" not in name else name
