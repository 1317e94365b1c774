"""What `lox-merge inspect --json` writes; docs/inspect.md says what each field means."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from lox_merge.publish.documents.hardening import Certificate
from lox_merge.publish.documents.shape import Interval, Shape, source_title


class Statistic(Shape):
    """mean over matrices, and of all energies together; with each what random subspaces of the same rank give."""

    mean: float | None
    energy: float | None
    expected: float | None
    band: Interval | None
    expected_energy: float | None
    band_energy: Interval | None
    matrices: int
    undecided: int


class EnergyKept(Shape):
    """Share of the squared norm that a fraction of the directions holds, by how they are chosen."""

    fraction: float
    top: Statistic
    random: Statistic
    random_k: Statistic


class Overlap(Shape):
    """MSO at the energy eta: mean over matrices, and what random subspaces give."""

    eta: float
    mean: float | None
    expected: float | None
    matrices: int
    undecided: int


class MeanRank(Shape):
    """A rank, mean over the matrices that decide it."""

    mean: float | None
    matrices: int
    undecided: int


class Cosines(Shape):
    """Cosines of updates; band: 95 % of random directions."""

    update_to_total: float | None
    update_to_alignment: float | None
    safety_angle: float | None
    band: Interval | None


class AlignedGroup(Shape):
    """Alignment's change over a group. r: R_align."""

    norm: float
    relative_norm: float | None
    r: Statistic
    energy_kept: tuple[EnergyKept, ...]
    effective_ranks: dict[str, MeanRank]
    noise_floor_rank: MeanRank


class FinetunedGroup(AlignedGroup):
    """One fine-tuned model's change over a group. r: R_ft."""

    ratio: Statistic
    mso: tuple[Overlap, ...]
    cosines: Cosines


class Pair(Shape):
    """Overlap of two fine-tuned models' changes; first, second: places in the list of labels."""

    first: int
    second: int
    mso: tuple[Overlap, ...]


class Group(Shape):
    """Matrices taken together: the whole model, its linear layers, a layer, a kind."""

    name: str
    matrices: int
    parameters: int
    aligned: AlignedGroup
    finetuned: tuple[FinetunedGroup, ...]
    pairs: tuple[Pair, ...]


class Spectrum(Shape):
    """Singular values at some indices (from 1)."""

    index: tuple[int, ...]
    values: tuple[float, ...]


class Chance(Shape):
    """What random subspaces give."""

    expected: float | None
    band: Interval | None


class AlignedMatrix(Shape):
    """Alignment's change of one matrix."""

    norm: float
    relative_norm: float | None
    r: float | None
    r_expected: float | None
    spectrum: Spectrum
    noise_edge: float | None
    noise_floor_rank: int | None
    effective_ranks: dict[str, float | None]
    certificate: Certificate | None
    undecided: str | None


class FinetunedMatrix(AlignedMatrix):
    """One fine-tuned model's change of one matrix."""

    ratio: float | None
    ratio_random: Chance | None
    cosines: Cosines


class Matrix(Shape):
    """One matrix; the fine-tuned models in the order of the labels."""

    name: str
    part: str
    shape: tuple[int, int]
    kind: str
    k: int | None
    aligned: AlignedMatrix
    finetuned: tuple[FinetunedMatrix, ...]

    @property
    def full_name(self) -> str:
        return self.name + self.part


class Settings(Shape):
    """What was asked for."""

    rank: str
    side: str
    draws: int
    seed: int
    full_spectrum: bool


class LeftOut(Shape):
    """A tensor that was not compared."""

    name: str
    reason: str


class Inspection(Shape):
    """What the weights of a pair and of models fine-tuned from it say."""

    tool: dict[str, Any]
    settings: Settings
    sources: dict[str, Any]
    labels: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    reverting: tuple[str, ...]
    whole: Group
    linear: Group
    layers: tuple[Group, ...]
    kinds: tuple[Group, ...]
    matrices: tuple[Matrix, ...]
    left_out: tuple[LeftOut, ...]

    @model_validator(mode="after")
    def _as_many_as_labels(self) -> Inspection:
        parts: list[Group | Matrix] = [self.whole, self.linear, *self.layers, *self.kinds, *self.matrices]
        for part in parts:
            if len(part.finetuned) != len(self.labels):
                raise ValueError(f"{part.name}: {len(part.finetuned)} entries of finetuned for {len(self.labels)} labels")
        return self

    @property
    def titles(self) -> tuple[str, str]:
        """Names of base and aligned."""
        base, aligned = (source_title(self.sources.get(role) or {}) for role in ("base", "aligned"))
        return base, aligned

    @property
    def averaged(self) -> Group:
        """What the authors average: the linear layers; the whole model where it has none."""
        return self.linear if self.linear.matrices else self.whole
