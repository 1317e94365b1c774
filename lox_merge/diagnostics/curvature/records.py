"""Figures of one group of parameters (one, a layer, all): the Fisher spectrum, and overlap scores with what chance would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from lox_merge.diagnostics.curvature.condition import Moments
from lox_merge.diagnostics.curvature.deltas import Delta
from lox_merge.diagnostics.curvature.gram import FisherGram
from lox_merge.diagnostics.curvature.projection import Projection
from lox_merge.diagnostics.curvature.settings import CurvatureSettings
from lox_merge.diagnostics.curvature.subspace import SafeSubspace, safe_subspace
from lox_merge.diagnostics.places import layer_name, layer_of, module_kinds
from lox_merge.maths.fisher import expected_overlap_score, overlap_scores, weighted_norm

# Leading eigenvalues that a record holds; a picture shows no more.
EIGENVALUES = 64


def spectrum_record(subspace: SafeSubspace) -> dict[str, Any]:
    """n, tr F, d, λ_d, the tail beyond d, effective dimensions, leading eigenvalues. None throughout where F = 0."""
    spectrum, d = subspace.spectrum, subspace.dimension
    return {
        "parameters": subspace.parameters,
        "trace": spectrum.trace,
        "rank": len(spectrum.values),
        "d": d,
        "smallest": spectrum.smallest(d),
        "tail": spectrum.tail(d),
        "effective": asdict(spectrum.effective),
        "eigenvalues": spectrum.values[:EIGENVALUES].tolist(),
    }


def parameter_records(gram: FisherGram, settings: CurvatureSettings) -> list[dict[str, Any]]:
    """One for each parameter, in the model's order."""
    kinds = module_kinds(list(gram.names))
    found = []
    for name in gram.names:
        where = layer_of(name)
        place = {"name": name, "kind": kinds[name], "layer": None if where is None else where[1], "stack": None if where is None else where[0]}
        found.append(place | spectrum_record(subspace_of(gram, [name], settings)))
    return found


def layers_of(names: Sequence[str]) -> dict[tuple[str, int], list[str]]:
    """Parameters by (stack, number) of their layer."""
    found: dict[tuple[str, int], list[str]] = {}
    for name in names:
        where = layer_of(name)
        if where is not None:
            found.setdefault(where, []).append(name)
    return found


def layer_records(gram: FisherGram, settings: CurvatureSettings) -> list[dict[str, Any]]:
    """One for each layer: F over all its parameters jointly, the blocks between them included."""
    return [
        {"name": layer_name(where), "stack": where[0], "layer": where[1]} | spectrum_record(subspace_of(gram, names, settings))
        for where, names in layers_of(gram.names).items()
    ]


def subspace_of(gram: FisherGram, names: Sequence[str] | None, settings: CurvatureSettings) -> SafeSubspace:
    return safe_subspace(gram, names, energy=settings.energy, dimension=settings.dimension)


def overlap_record(
    delta: Delta, place: int, products: Mapping[str, Tensor], gram: FisherGram, parameters: Sequence[dict[str, Any]], projection: Projection | None
) -> dict[str, Any]:
    """Overlap scores of one fine-tuned model, each parameter alone (their sum is the paper's block-wise view) and all jointly."""
    found, total, expected, squares = [], 0.0, 0.0, 0.0
    names = [record["name"] for record in parameters if record["name"] in delta.changes]
    traces = {record["name"]: record["trace"] for record in parameters}
    for name in names:
        square = float(delta.changes[name].double().square().sum())
        score = float(overlap_scores(products[name][place]))
        chance = expected_overlap_score(square, traces[name], gram.sizes[name])
        total, expected, squares = total + score, expected + chance, squares + square
        entry = {"name": name, "score": score, "expected": chance, "ratio": score / chance if chance else None, "squared_norm": square}
        if projection is not None and name in projection.names:
            entry["projected"] = projection.scores(name, delta.changes[name])
        found.append(entry)
    joint = float(overlap_scores(sum((products[name][place] for name in names), gram.grams[gram.names[0]].new_zeros(gram.examples))))
    trace = sum(traces[name] for name in names)
    chance = expected_overlap_score(squares, trace, gram.size(names)) if names else 0.0
    return {
        "name": delta.label,
        "source": delta.source,
        "left_out": delta.left_out,
        "norm": squares**0.5,
        "score": total,
        # Every parameter keeps the norm of its own change; for `joint`, the whole change may point anywhere.
        "expected": expected,
        "ratio": total / expected if expected else None,
        "joint": joint,
        "joint_expected": chance,
        "joint_ratio": joint / chance if chance else None,
        # ½ ΔθᵀFΔθ, the loss of log-likelihood that Proposition 3.3 gives for this change.
        "predicted_loss": joint / 2,
        "parameters": found,
    }


def coupling_by_layer(found: Moments, gram: FisherGram, settings: CurvatureSettings) -> list[dict[str, Any]]:
    """γ and ||F^{1/2} P g|| of each layer by itself, with its own subspace."""
    records = []
    for where, names in layers_of(gram.names).items():
        subspace = subspace_of(gram, names, settings)
        first, second = sum((found.by_name[name] for name in names), gram.grams[names[0]].new_zeros(2, gram.examples))
        d = subspace.dimension
        records.append(
            {
                "name": layer_name(where),
                "stack": where[0],
                "layer": where[1],
                "coupling": None if d is None else float(weighted_norm(subspace.spectrum, second, d)),
                "first_order": None if d is None else float(weighted_norm(subspace.spectrum, first, d)),
            }
        )
    return records
