"""What the projection filter reports: one record per matrix, and the figures over all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from lox_merge.jobs.work import certificate_record
from lox_merge.maths.directions import Directions
from lox_merge.maths.edits import Realised
from lox_merge.maths.filter import Decision, Projection

_UNDEFINED = ("decision", "rank", "method", "kept", "kept_random", "energy_kept", "cosine", "certificate", "realised")


@dataclass(frozen=True)
class FilterOutcome:
    """What was done to one matrix. bad: NaN and Inf in its deltas (then nothing else holds). changed: whether Δ_ft is not zero.

    record: the manifest's figures, plain values: results wait for the writer, and factors of high rank are as large as the matrix.
    """

    label: str
    shape: tuple[int, int]
    bad: int = 0
    changed: bool = False
    record: dict[str, Any] = field(default_factory=dict)
    realised: Realised | None = None

    @property
    def computed(self) -> bool:
        return self.realised is not None

    def to_json(self) -> dict[str, Any]:
        """The manifest's record. Undefined values are null."""
        start: dict[str, Any] = {"part": self.label, "shape": list(self.shape)}
        return start | (self.record or {"delta_norm": None, "finetuned_norm": 0.0} | dict.fromkeys(_UNDEFINED))


def filter_figures(
    delta_norm: float, decision: Decision, directions: Directions | None, projection: Projection, realised: Realised | None
) -> dict[str, Any]:
    """One matrix's figures as plain values. realised: None where the matrix stays as fine-tuned."""
    kept, certificate = projection.kept, None if directions is None else directions.certificate
    return {
        "delta_norm": delta_norm,
        "finetuned_norm": projection.finetuned_norm,
        "decision": decision,
        "rank": None if directions is None else directions.rank,
        "method": "whole delta" if directions is None else directions.method,
        "kept": kept,
        "kept_random": projection.kept_random,
        "energy_kept": None if kept is None else kept**2,
        "cosine": projection.cosine,
        "certificate": None if certificate is None else certificate_record(certificate),
        "realised": None if realised is None else asdict(realised),
    }


@dataclass(frozen=True)
class FilterSummary:
    """Figures over all matrices with a fine-tuning update. None where there is nothing to average.

    mean_kept: mean of ‖P(Δ_ft)‖/‖Δ_ft‖ per matrix; energy_kept: Σ‖P(Δ_ft)‖²/Σ‖Δ_ft‖² over the whole model; …_random: the same for
    a Haar-random subspace of equal rank. dense: matrices decomposed whole. realised_gain: Σ⟨R,T⟩/Σ‖T‖², T = ±P(Δ_ft).
    """

    edited_tensors: int
    edited_matrices: int
    copied_tensors: int
    zero_deltas: int
    filtered: int
    left_as_finetuned: int
    merged: int
    mean_rank: float | None
    mean_kept: float | None
    mean_kept_random: float | None
    energy_kept: float | None
    energy_kept_random: float | None
    smallest_cosine: float | None
    smallest_cosine_tensor: str | None
    dense: int
    realised_gain: float | None
    smallest_gain: float | None
    smallest_gain_tensor: str | None
    largest_angle_bound: float | None
    largest_angle_tensor: str | None
    ambiguous_matrices: int


def _matrices(tensors: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for tensor in tensors:
        for matrix in tensor.get("matrices", ()):
            if matrix["decision"] is not None:
                yield tensor["name"] + matrix["part"], matrix


def least_similar_on_record(tensors: list[dict[str, Any]], layers: int) -> frozenset[str]:
    """Names (tensor and part) of the matrices with the smallest cosines of a manifest's entries; ties go to the first."""
    cosines = [(0.0 if matrix["cosine"] is None else matrix["cosine"], order, name) for order, (name, matrix) in enumerate(_matrices(tensors))]
    return frozenset(name for _, _, name in sorted(cosines)[:layers])


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def summarise_filter(tensors: list[dict[str, Any]]) -> FilterSummary:
    """The figures of a manifest's entries, one per tensor."""
    named = list(_matrices(tensors))
    matrices = [matrix for _, matrix in named]
    total = math.fsum(matrix["finetuned_norm"] ** 2 for matrix in matrices)
    with_random = [matrix for matrix in matrices if matrix["kept_random"] is not None]
    random_energy = math.fsum((matrix["kept_random"] * matrix["finetuned_norm"]) ** 2 for matrix in with_random)
    kept = [matrix for matrix in matrices if matrix["energy_kept"] is not None]
    written = [(name, matrix["realised"]) for name, matrix in named if matrix["realised"] and matrix["realised"]["gain"] is not None]
    intended = math.fsum(entry["intended_norm"] ** 2 for _, entry in written)
    gained = math.fsum(entry["gain"] * entry["intended_norm"] ** 2 for _, entry in written)
    worst_gain = min(written, key=lambda pair: pair[1]["gain"], default=None)
    least = min(((name, matrix["cosine"]) for name, matrix in named if matrix["cosine"] is not None), key=lambda pair: pair[1], default=None)
    certificates = [(name, matrix["certificate"]) for name, matrix in named if matrix["certificate"]]
    bounds = [(name, entry["angle_bound"]) for name, entry in certificates if entry["angle_bound"] is not None]
    worst_angle = max(bounds, key=lambda pair: pair[1], default=None)
    decisions = [matrix["decision"] for matrix in matrices]
    return FilterSummary(
        edited_tensors=sum(tensor["action"] == "edited" for tensor in tensors),
        edited_matrices=len(matrices),
        copied_tensors=sum(tensor["action"] == "copied" for tensor in tensors),
        zero_deltas=sum(tensor.get("reason") == "the fine-tuning delta is zero" for tensor in tensors),
        filtered=decisions.count("filtered"),
        left_as_finetuned=decisions.count("kept"),
        merged=decisions.count("merged"),
        mean_rank=_mean([matrix["rank"] for matrix in matrices if matrix["rank"] is not None]),
        mean_kept=_mean([matrix["kept"] for matrix in matrices if matrix["kept"] is not None]),
        mean_kept_random=_mean([matrix["kept_random"] for matrix in with_random]),
        energy_kept=math.fsum(matrix["energy_kept"] * matrix["finetuned_norm"] ** 2 for matrix in kept) / total if total else None,
        energy_kept_random=random_energy / total if total and with_random else None,
        smallest_cosine=least[1] if least else None,
        smallest_cosine_tensor=least[0] if least else None,
        dense=sum(matrix["method"] in ("exact", "gram") for matrix in matrices),
        realised_gain=gained / intended if intended else None,
        smallest_gain=worst_gain[1]["gain"] if worst_gain else None,
        smallest_gain_tensor=worst_gain[0] if worst_gain else None,
        largest_angle_bound=worst_angle[1] if worst_angle else None,
        largest_angle_tensor=worst_angle[0] if worst_angle else None,
        ambiguous_matrices=sum(bool(entry["ambiguous"]) for _, entry in certificates),
    )
