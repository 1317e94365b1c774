"""The figures of one matrix or vector as plain values: what the JSON holds of it (docs/inspect.md)."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from lox_merge.diagnostics.measures import Measures, Overlap, Spectrum, Update, leading_sum
from lox_merge.diagnostics.one_pass import Matrix, Vector
from lox_merge.diagnostics.places import layer_name
from lox_merge.diagnostics.settings import InspectSettings
from lox_merge.jobs.work import certificate_record
from lox_merge.maths.geometry import EffectiveRanks, Products, count_above, effective_ranks, expected_overlap
from lox_merge.maths.random_subspace import band, band_of_draws, concentration_bound, cosine_band, haar_energy, sampled_energy

# A longer spectrum is sampled: a picture of it needs no more, and a large model has hundreds of them.
_LISTED = 128
Share = tuple[float, float]
"""Mean and variance of a share."""


def root_share(part: float | None, total: float) -> float | None:
    """√(part/total) within [0, 1]; None where undecided or undefined."""
    return None if part is None or total == 0 else math.sqrt(min(1.0, part / total))


def r_align(measures: Measures) -> float | None:
    """R_align = ‖Proj_k(Δ_align)‖/‖Δ_align‖ (LoX, Eq. 1)."""
    assert measures.spectrum is not None
    return root_share(measures.spectrum.energy(measures.rank), measures.spectrum.total)


def r_ft(measures: Measures, update: Update) -> float | None:
    """R_ft = ‖Proj_k(Δ_align + Δ_ft)‖/‖Δ_align + Δ_ft‖ (LoX, Eq. 2); None too where Δ_align is zero and has no directions."""
    return root_share(float(update.kept_total[: measures.rank].sum()), update.products.total) if measures.rank else None


def quotient(part: float | None, whole: float | None) -> float | None:
    """part/whole; None where either is missing or the whole is zero."""
    return None if part is None or not whole else part / whole


def kept_energy(measures: Measures, update: Update | None, count: int) -> float | None:
    """‖Proj_count(Δ)‖² for Δ_align itself (update None) or Δ_ft, under the leading directions of Δ_align."""
    spectrum = measures.spectrum
    assert spectrum is not None
    if update is None:
        return spectrum.energy(count)
    return leading_sum(update.kept, count, spectrum.complete) if spectrum.total else None


def random_share(measures: Measures, update: Update | None, count: int) -> Share:
    """Mean and variance (an upper bound where the spectrum is cut) of the share of Δ that a Haar-random subspace keeps."""
    spectrum = measures.spectrum if update is None else update.spectrum
    assert spectrum is not None
    concentration = concentration_bound(spectrum.squares, spectrum.total, spectrum.following)
    return haar_energy(min(count, measures.dimension), measures.dimension, concentration)


def random_directions_share(measures: Measures, update: Update | None, count: int) -> Share | None:
    """Mean and variance of what `count` random singular directions of Δ_align keep; None where not all of them are known."""
    spectrum = measures.spectrum
    assert spectrum is not None
    energies = spectrum.squares if update is None else update.kept
    total = spectrum.total if update is None else update.spectrum.total
    if not spectrum.complete or total == 0 or not 0 < count <= energies.numel():
        return None
    return sampled_energy(energies / total, count)


def ranks_of(spectrum: Spectrum) -> EffectiveRanks:
    return effective_ranks(spectrum.squares, spectrum.total, complete=spectrum.complete)


def noise_floor_rank(spectrum: Spectrum) -> int | None:
    """Directions above what rounding of the stored weights alone would give."""
    return count_above(spectrum.squares, spectrum.following, spectrum.noise_edge, complete=spectrum.complete)


def cosines(products: Products, entries: int) -> dict[str, Any]:
    """With what an update of the same length in a random direction gives: 0 for the angle to the alignment, more for that to the sum."""
    low, high = cosine_band(entries)
    return {
        "update_to_total": products.update_to_total,
        "update_to_total_expected": products.update_to_total_at(0.0),
        "update_to_total_band": [products.update_to_total_at(low), products.update_to_total_at(high)] if products.update else None,
        "update_to_alignment": products.update_to_alignment,
        "safety_angle": products.safety_angle,
        "band": [low, high],
    }


def matrix_record(matrix: Matrix, settings: InspectSettings) -> dict[str, Any]:
    """One entry of `matrices`."""
    measures, tensor = matrix.measures, matrix.tensor
    assert measures.spectrum is not None and measures.drawn is not None
    own = r_align(measures)
    return {
        "name": tensor.name,
        "part": matrix.view.label,
        "shape": list(matrix.shape),
        "transposed": tensor.transposed,
        "layer": layer_name(tensor.layer),
        "kind": matrix.kind,
        "linear": tensor.linear,
        "vocabulary": tensor.vocabulary,
        "k": measures.rank,
        "aligned": {
            "norm": math.sqrt(measures.spectrum.total),
            "relative_norm": quotient(math.sqrt(measures.spectrum.total), measures.weight_norm),
            "r": own,
            "r_expected": math.sqrt(measures.rank / measures.dimension) if measures.rank else None,
            "energy_kept": _energy_kept(matrix, None, settings),
            **_spectrum(measures.spectrum),
        },
        "finetuned": [
            {
                "norm": math.sqrt(update.spectrum.total),
                "relative_norm": quotient(math.sqrt(update.spectrum.total), measures.weight_norm),
                "r": (after := r_ft(measures, update)),
                "r_expected": math.sqrt(measures.rank / measures.dimension) if measures.rank else None,
                "ratio": quotient(after, own),
                "ratio_random": _ratio_random(measures, update),
                "energy_kept": _energy_kept(matrix, update, settings),
                "cosines": cosines(update.products, matrix.entries),
                "mso": overlap_records(update.overlaps, settings, measures.dimension, "k_align", "k_ft"),
                **_spectrum(update.spectrum),
            }
            for update in measures.updates
        ],
        "pairs": [
            {"first": i, "second": j, "mso": overlap_records(overlaps, settings, measures.dimension, "k_first", "k_second")}
            for i, j, overlaps in measures.pairs
        ],
    }


def vector_record(vector: Vector) -> dict[str, Any]:
    """One entry of `vectors`."""
    return {
        "name": vector.tensor.name,
        "layer": layer_name(vector.tensor.layer),
        "entries": vector.tensor.info.size,
        "aligned": {"norm": vector.norm, "relative_norm": quotient(vector.norm, vector.weight_norm)},
        "finetuned": [
            {
                "norm": math.sqrt(products.update),
                "relative_norm": quotient(math.sqrt(products.update), vector.weight_norm),
                "cosines": cosines(products, vector.tensor.info.size),
            }
            for products in vector.updates
        ],
    }


def overlap_records(overlaps: tuple[Overlap, ...], settings: InspectSettings, dimension: int, first: str, second: str) -> list[dict[str, Any]]:
    return [
        {
            "eta": eta,
            "mso": overlap.value,
            "expected": None if overlap.first is None or overlap.second is None else expected_overlap(overlap.first, overlap.second, dimension),
            first: overlap.first,
            second: overlap.second,
        }
        for eta, overlap in zip(settings.etas, overlaps, strict=True)
    ]


def _energy_kept(matrix: Matrix, update: Update | None, settings: InspectSettings) -> list[dict[str, Any]]:
    measures = matrix.measures
    spectrum = measures.spectrum if update is None else update.spectrum
    assert spectrum is not None
    entries = []
    for fraction in settings.fractions:
        count = settings.fraction_rank(fraction, min(matrix.shape))
        top = quotient(kept_energy(measures, update, count), spectrum.total)
        entries.append(
            {
                "fraction": fraction,
                "k": count,
                "top": None if top is None else min(1.0, top),
                "random": _share(random_share(measures, update, count)) if spectrum.total else None,
                "random_k": _share(random_directions_share(measures, update, count)),
            }
        )
    return entries


def _share(share: Share | None) -> dict[str, Any] | None:
    return None if share is None else {"expected": share[0], "band": list(band(*share))}


def _ratio_random(measures: Measures, update: Update) -> dict[str, Any] | None:
    """R_ft/R_align with each random subspace in place of the leading directions: no closed form, so seeded draws."""
    spectrum, drawn = measures.spectrum, measures.drawn
    assert spectrum is not None and drawn is not None
    if not measures.rank or not update.products.total:
        return None
    before, after = (drawn / spectrum.total).sqrt(), (update.drawn_total / update.products.total).sqrt()
    mean, limits = band_of_draws((after / before).tolist())
    return {"expected": mean, "band": None if limits is None else list(limits)}


def _spectrum(spectrum: Spectrum) -> dict[str, Any]:
    of = spectrum.of
    computed = spectrum.squares.numel()
    index = _sampled(computed)
    cut = not spectrum.complete
    return {
        "spectrum": {
            "index": [place + 1 for place in index],
            "values": spectrum.squares[index].sqrt().tolist() if computed else [],
            "computed": computed,
            "of": of,
            "complete": spectrum.complete,
        },
        "noise_edge": spectrum.noise_edge,
        "noise_floor_rank": noise_floor_rank(spectrum),
        "effective_ranks": asdict(ranks_of(spectrum)),
        "certificate": certificate_record(spectrum.certificate),
        "undecided": f"only the leading {computed} of {of} singular values were computed; --full-spectrum decides what they cannot" if cut else None,
    }


def _sampled(count: int) -> list[int]:
    """All places below `count`, or _LISTED of them evenly in the logarithm, first and last among them."""
    if count <= _LISTED:
        return list(range(count))
    return sorted({round(count ** (place / (_LISTED - 1))) - 1 for place in range(_LISTED)})
