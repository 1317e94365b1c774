"""Groups of matrices: the whole model, its linear layers, each layer, each kind of module."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lox_merge.diagnostics.measures import Overlap, Spectrum, Update
from lox_merge.diagnostics.one_pass import Matrix, Measured, Vector
from lox_merge.diagnostics.places import layer_name
from lox_merge.diagnostics.records import (
    cosines,
    kept_energy,
    noise_floor_rank,
    quotient,
    random_directions_share,
    random_share,
    ranks_of,
)
from lox_merge.diagnostics.settings import InspectSettings
from lox_merge.diagnostics.statistics import Term, ratios, roots, shares
from lox_merge.maths.geometry import Products, expected_overlap

EFFECTIVE_RANKS = ("energy_50", "energy_90", "energy_99", "stable", "participation")


def group_record(
    name: str, matrices: Sequence[Matrix], vectors: Sequence[Vector], models: int, settings: InspectSettings, **place: Any
) -> dict[str, Any]:
    """One group of docs/inspect.md. vectors: enter norms and cosines. models: how many were fine-tuned."""
    weight = math.fsum(matrix.measures.weight_norm**2 for matrix in matrices) + math.fsum(vector.weight_norm**2 for vector in vectors)
    norm = math.sqrt(math.fsum(_spectrum(matrix).total for matrix in matrices) + math.fsum(vector.norm**2 for vector in vectors))
    entries = sum(matrix.entries for matrix in matrices) + sum(vector.tensor.info.size for vector in vectors)
    before = {id(matrix): _own_term(matrix) for matrix in matrices}
    return {
        "name": name,
        "stack": None,
        "number": None,
        "vocabulary": bool(matrices) and all(matrix.tensor.vocabulary for matrix in matrices),
        **place,
        "matrices": len(matrices),
        "parameters": entries,
        "aligned": {
            "norm": norm,
            "relative_norm": quotient(norm, math.sqrt(weight)),
            "r": roots([term for term in before.values() if term is not None]).to_json(),
            "energy_kept": _energy_kept(matrices, None, settings),
            **_spectra([_spectrum(matrix) for matrix in matrices]),
        },
        "finetuned": [_finetuned(matrices, vectors, place_of, before, entries, weight, settings) for place_of in range(models)],
        "pairs": [
            {"first": i, "second": j, "mso": _overlaps([(matrix, _pair(matrix, i, j)) for matrix in matrices], settings)}
            for i in range(models)
            for j in range(i + 1, models)
        ],
    }


def _finetuned(
    matrices: Sequence[Matrix],
    vectors: Sequence[Vector],
    model: int,
    before: dict[int, Term | None],
    entries: int,
    weight: float,
    settings: InspectSettings,
) -> dict[str, Any]:
    products = sum((matrix.measures.updates[model].products for matrix in matrices), Products())
    products = sum((vector.updates[model] for vector in vectors), products)
    norm = math.sqrt(products.update)
    after = [(before[id(matrix)], _total_term(matrix, model)) for matrix in matrices]
    both = [(one, other) for one, other in after if one is not None and other is not None]
    return {
        "norm": norm,
        "relative_norm": quotient(norm, math.sqrt(weight)),
        "r": roots([other for _, other in after if other is not None]).to_json(),
        "ratio": ratios([one for one, _ in both], [other for _, other in both]).to_json(),
        "energy_kept": _energy_kept(matrices, model, settings),
        "cosines": cosines(products, entries),
        "mso": _overlaps([(matrix, matrix.measures.updates[model].overlaps) for matrix in matrices], settings),
        **_spectra([matrix.measures.updates[model].spectrum for matrix in matrices]),
    }


def _spectrum(matrix: Matrix) -> Spectrum:
    assert matrix.measures.spectrum is not None
    return matrix.measures.spectrum


def _own_term(matrix: Matrix) -> Term | None:
    """R_align's; None for Δ_align = 0."""
    measures, spectrum = matrix.measures, _spectrum(matrix)
    kept = spectrum.energy(measures.rank)
    if not measures.rank or kept is None:
        return None
    return Term(kept, spectrum.total, measures.rank / measures.dimension, drawn=measures.drawn)


def _total_term(matrix: Matrix, model: int) -> Term | None:
    """R_ft's; None where Δ_align or Δ_align + Δ_ft is zero."""
    measures, update = matrix.measures, matrix.measures.updates[model]
    if not measures.rank or not update.products.total:
        return None
    kept = float(update.kept_total[: measures.rank].sum())
    return Term(kept, update.products.total, measures.rank / measures.dimension, drawn=update.drawn_total)


def _energy_kept(matrices: Sequence[Matrix], model: int | None, settings: InspectSettings) -> list[dict[str, Any]]:
    entries = []
    for fraction in settings.fractions:
        top, random, random_k = list[Term](), list[Term](), list[Term]()
        undecided = without_directions = 0
        for matrix in matrices:
            measures = matrix.measures
            update: Update | None = None if model is None else measures.updates[model]
            total = _spectrum(matrix).total if update is None else update.spectrum.total
            if not total or not _spectrum(matrix).total:
                continue
            count = settings.fraction_rank(fraction, min(matrix.shape))
            kept, haar = kept_energy(measures, update, count), random_share(measures, update, count)
            directions = random_directions_share(measures, update, count)
            random.append(Term(haar[0] * total, total, *haar))
            if kept is None:
                undecided += 1
            else:
                top.append(Term(kept, total, *haar))
            if directions is None:
                without_directions += 1
            else:
                random_k.append(Term(directions[0] * total, total, *directions))
        entries.append(
            {
                "fraction": fraction,
                "top": shares(top, undecided).to_json(),
                "random": shares(random).to_json(),
                "random_k": shares(random_k, without_directions).to_json(),
            }
        )
    return entries


def _mean(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean over the matrices that decide it."""
    known = [value for value in values if value is not None]
    return {"mean": math.fsum(known) / len(known) if known else None, "matrices": len(known), "undecided": len(values) - len(known)}


def _spectra(spectra: Sequence[Spectrum]) -> dict[str, Any]:
    defined = [spectrum for spectrum in spectra if spectrum.total]
    ranks = [ranks_of(spectrum) for spectrum in defined]
    return {
        "effective_ranks": {name: _mean([getattr(rank, name) for rank in ranks]) for name in EFFECTIVE_RANKS},
        "noise_floor_rank": _mean([noise_floor_rank(spectrum) for spectrum in defined]),
    }


def _pair(matrix: Matrix, first: int, second: int) -> tuple[Overlap, ...]:
    return next(overlaps for i, j, overlaps in matrix.measures.pairs if (i, j) == (first, second))


def _overlaps(found: Sequence[tuple[Matrix, tuple[Overlap, ...]]], settings: InspectSettings) -> list[dict[str, Any]]:
    entries = []
    for place, eta in enumerate(settings.etas):
        values, expected, undecided = list[float](), list[float](), 0
        for matrix, overlaps in found:
            overlap = overlaps[place]
            if overlap.value is None or overlap.first is None or overlap.second is None:
                undecided += overlap.defined
                continue
            values.append(overlap.value)
            expected.append(expected_overlap(overlap.first, overlap.second, matrix.measures.dimension))
        count = len(values)
        entries.append(
            {
                "eta": eta,
                "mean": math.fsum(values) / count if count else None,
                "expected": math.fsum(expected) / count if count else None,
                "matrices": count,
                "undecided": undecided,
            }
        )
    return entries


def all_groups(measured: Measured, models: int, settings: InspectSettings) -> dict[str, Any]:
    """'whole', 'linear', 'layers' and 'kinds'."""
    matrices, vectors = measured.matrices, measured.vectors

    def record(name: str, keep: Callable[[Matrix], bool], also: Sequence[Vector] = (), **place: Any) -> dict[str, Any]:
        return group_record(name, [matrix for matrix in matrices if keep(matrix)], also, models, settings, **place)

    layers = sorted({matrix.tensor.layer for matrix in matrices if matrix.tensor.layer is not None})
    kinds = dict.fromkeys(matrix.kind for matrix in matrices)
    return {
        "whole": record("whole", lambda _matrix: True, vectors),
        "linear": record("linear", lambda matrix: matrix.tensor.linear),
        "layers": [
            record(
                str(layer_name(layer)),
                lambda matrix, layer=layer: matrix.tensor.layer == layer,  # type: ignore[misc]
                [vector for vector in vectors if vector.tensor.layer == layer],
                stack=layer[0],
                number=layer[1],
            )
            for layer in layers
        ],
        "kinds": [record(kind, lambda matrix, kind=kind: matrix.kind == kind) for kind in kinds],  # type: ignore[misc]
    }
