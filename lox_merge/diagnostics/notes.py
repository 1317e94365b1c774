"""What has to be said beside the figures of an inspection, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from lox_merge.diagnostics.one_pass import Measured
from lox_merge.diagnostics.settings import InspectSettings
from lox_merge.maths.geometry import REVERTING_COSINE, Products


def reversals(measured: Measured, models: int) -> list[float | None]:
    """cos φ_T of each fine-tuned model over the tensors that its fine-tuning changed.

    One that undoes alignment in a few modules would hide behind all the others.
    """
    changed = [[products for products in _products(measured, place) if products.update] for place in range(models)]
    return [sum(products, Products()).safety_angle for products in changed]


def notes(measured: Measured, labels: Sequence[str], settings: InspectSettings) -> list[str]:
    """About each fine-tuned model, then about what was computed."""
    found = []
    for place, (label, angle) in enumerate(zip(labels, reversals(measured, len(labels)), strict=True)):
        found += _about_model(_products(measured, place), label, angle)
    zero = [matrix for matrix in measured.matrices if matrix.measures.spectrum is not None and matrix.measures.spectrum.total == 0]
    if zero:
        found.append(f"Alignment left {len(zero)} of {len(measured.matrices)} matrices as they were ({zero[0].label}): their ratios are undefined.")
    clipped = [matrix for matrix in measured.matrices if settings.rule.kind == "fixed" and settings.rule.value > min(matrix.shape)]
    if clipped:
        found.append(f"Rank {settings.rule} is above the short side of {len(clipped)} matrices ({clipped[0].label}) and was clipped to it.")
    dense = [matrix for matrix in measured.matrices if settings.triplets_of(min(matrix.shape)) == min(matrix.shape)]
    cut = [matrix for matrix in measured.matrices if matrix.measures.spectrum is not None and not matrix.measures.spectrum.complete]
    if cut:
        counts = {matrix.measures.spectrum.squares.numel() for matrix in cut if matrix.measures.spectrum is not None}
        span = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
        found.append(
            f"Of {len(cut)} matrices only the leading {span} singular values were computed. What they cannot decide is left undefined; "
            "--full-spectrum decides it."
        )
    elif not settings.full_spectrum and dense and max(min(matrix.shape) for matrix in dense) > 128:
        found.append("Ranks or fractions above a fifth of the short side: whole spectra were computed, by a float64 Gram eigendecomposition.")
    return found


def _products(measured: Measured, place: int) -> list[Products]:
    return [matrix.measures.updates[place].products for matrix in measured.matrices] + [vector.updates[place] for vector in measured.vectors]


def _about_model(everything: Sequence[Products], label: str, angle: float | None) -> list[str]:
    if not any(products.update for products in everything):
        return [f"{label} has the weights of aligned: nothing was fine-tuned. R_ft/R_align is 1 where defined, cosines are undefined."]
    if not any(products.total for products in everything):
        return [f"{label} has the weights of base: its fine-tuning took all of the alignment back. R_ft is undefined."]
    if angle is not None and angle >= REVERTING_COSINE:
        return [
            f"{label} points back along −Δ_align (cosine {angle:.3f} over the tensors it changed): its fine-tuning walks back towards base. "
            "Filtering its update would write a model with its alignment removed."
        ]
    return []
