"""The figures of a hardening that people read, from the manifest's entries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Summary:
    """Figures over all edited matrices. None where there is nothing to average.

    mean_r_align: mean of R_align per matrix; energy_r_align: √(Σ‖Proj(Δ)‖²/Σ‖Δ‖²). realised_gain: Σ⟨R,T⟩/Σ‖T‖² over the
    whole model; smallest_gain: the matrix that lost most. largest_angle_bound: worst certificate (radians' sine).
    """

    edited_tensors: int
    edited_matrices: int
    copied_tensors: int
    zero_deltas: int
    mean_rank: float | None
    mean_r_align: float | None
    energy_r_align: float | None
    realised_gain: float | None
    smallest_gain: float | None
    smallest_gain_tensor: str | None
    largest_angle_bound: float | None
    largest_angle_tensor: str | None
    ambiguous_matrices: int


def _matrices(tensors: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for tensor in tensors:
        for matrix in tensor.get("matrices", ()):
            if matrix["realised"] is not None:
                yield tensor["name"] + matrix["part"], matrix


def summarise(tensors: list[dict[str, Any]]) -> Summary:
    """The figures of a manifest's entries, one per tensor."""
    matrices = list(_matrices(tensors))
    ratios = [matrix["r_align"] for _, matrix in matrices if matrix["r_align"] is not None]
    ranks = [min(matrix["shape"]) if matrix["rank"] == "full" else matrix["rank"] for _, matrix in matrices]
    total = math.fsum(matrix["delta_norm"] ** 2 for _, matrix in matrices)
    kept = math.fsum((matrix["r_align"] or 0.0) ** 2 * matrix["delta_norm"] ** 2 for _, matrix in matrices)
    realised = [(name, matrix["realised"]) for name, matrix in matrices if matrix["realised"]["gain"] is not None]
    intended = math.fsum(entry["intended_norm"] ** 2 for _, entry in realised)
    gained = math.fsum(entry["gain"] * entry["intended_norm"] ** 2 for _, entry in realised)
    worst_gain = min(realised, key=lambda pair: pair[1]["gain"], default=None)
    bounds = [
        (name, matrix["certificate"]["angle_bound"])
        for name, matrix in matrices
        if matrix["certificate"] and matrix["certificate"]["angle_bound"] is not None
    ]
    worst_angle = max(bounds, key=lambda pair: pair[1], default=None)
    return Summary(
        edited_tensors=sum(tensor["action"] == "edited" for tensor in tensors),
        edited_matrices=len(matrices),
        copied_tensors=sum(tensor["action"] == "copied" for tensor in tensors),
        zero_deltas=sum(tensor.get("reason") == "the delta is zero" for tensor in tensors),
        mean_rank=sum(ranks) / len(ranks) if ranks else None,
        mean_r_align=math.fsum(ratios) / len(ratios) if ratios else None,
        energy_r_align=math.sqrt(kept / total) if total else None,
        realised_gain=gained / intended if intended else None,
        smallest_gain=worst_gain[1]["gain"] if worst_gain else None,
        smallest_gain_tensor=worst_gain[0] if worst_gain else None,
        largest_angle_bound=worst_angle[1] if worst_angle else None,
        largest_angle_tensor=worst_angle[0] if worst_angle else None,
        ambiguous_matrices=sum(bool(matrix["certificate"] and matrix["certificate"]["ambiguous"]) for _, matrix in matrices),
    )
