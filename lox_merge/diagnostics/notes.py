"""What has to be said beside the figures of an inspection, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from lox_merge.diagnostics.one_pass import Measured
from lox_merge.diagnostics.settings import InspectSettings
from lox_merge.maths.geometry import REVERTING_COSINE


def notes(measured: Measured, labels: Sequence[str], angles: Sequence[float | None], settings: InspectSettings) -> list[str]:
    """angles: cos φ_T of each fine-tuned model over all parameters."""
    found = []
    for place, (label, angle) in enumerate(zip(labels, angles, strict=True)):
        found += _about_model(measured, place, label, angle)
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


def _about_model(measured: Measured, place: int, label: str, angle: float | None) -> list[str]:
    updates = [matrix.measures.updates[place] for matrix in measured.matrices]
    others = [vector.updates[place] for vector in measured.vectors]
    everything = [update.products for update in updates] + others
    if not any(products.update for products in everything):
        return [f"{label} has the weights of aligned: nothing was fine-tuned. R_ft/R_align is 1 where defined, cosines are undefined."]
    if not any(products.total for products in everything):
        return [f"{label} has the weights of base: its fine-tuning took all of the alignment back. R_ft is undefined."]
    if angle is not None and angle >= REVERTING_COSINE:
        return [
            f"{label} points back along −Δ_align (cosine {angle:.3f}): its fine-tuning walks back towards the base model. "
            "Filtering its update would write a model with its alignment removed."
        ]
    return []
