"""What a job can do with quantised checkpoints, what it says of them, and what became of an edit in their form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.checkpoint.quantised.view import QuantisedCheckpoint, quantised_among, quantised_form
from lox_merge.errors import RequestError
from lox_merge.jobs.edit import Edit
from lox_merge.jobs.settings import Settings

# What is written: a whole model, or an adapter beside the aligned one.
Form = Literal["model", "adapter"]
# What may be asked for: 'usual' is an adapter where the aligned model is quantised and its form has to stay, else a model. 'memory' is
# for whoever edits loaded models and writes nothing.
AskedForm = Literal["model", "adapter", "usual", "memory"]


def settled_form(mirrored: Checkpoint, recipe: Settings, edit: Edit, asked: AskedForm) -> Form:
    """What will be written. Rounded back to a quantised form an edit is lost or drowns in noise; an adapter keeps it exactly."""
    if asked == "memory":
        return "model"
    if asked != "usual":
        return asked
    return "adapter" if quantised_form(mirrored) is not None and recipe.dtype is None and not edit.requantises else "model"


def usual_form_warnings(mirrored: Checkpoint) -> list[str]:
    """Says that an adapter is written where nobody asked for one."""
    return [
        f"{_usual_form(mirrored)} --dtype bfloat16 writes a plain model; --requantise keeps the form and reports what is left of the edit.",
    ]


def usual_form_error(mirrored: Checkpoint, problem: str, instead: str = "") -> RequestError:
    """Why the adapter cannot be written that nobody asked for by name. instead: what else may be done than ask for another form."""
    return RequestError(
        f"{_usual_form(mirrored)} {problem} {f'{instead}, or pass' if instead else 'Pass'} --dtype bfloat16 for a plain model, "
        "or --requantise to keep the quantised form."
    )


def _usual_form(mirrored: Checkpoint) -> str:
    view = quantised_form(mirrored)
    assert view is not None
    return (
        f"{mirrored.role} ({mirrored.title}) is quantised ({view.description}): the edit is written as an adapter beside its weights, which keeps "
        "it exactly (docs/quantised.md)."
    )


def form_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The form of a quantised source, for its entry in a manifest or result; {} for a plain one."""
    view = quantised_form(checkpoint)
    return {} if view is None else {"quantised": view.description}


def form_problems(mirrored: Checkpoint, recipe: Settings, edit: Edit, form: Form) -> list[str]:
    """Why the output cannot be written in the form that was asked for."""
    view = quantised_form(mirrored)
    if edit.requantises:
        if form == "adapter":
            return ["--requantise writes the model's own weights anew, --as-adapter leaves them alone. Leave one of them out."]
        if view is None:
            return [f"--requantise keeps the form of a quantised model, and {mirrored.role} ({mirrored.title}) is not quantised. Leave it out."]
        if view is not mirrored:
            return [f"--requantise: {mirrored.role} ({mirrored.title}) is an adapter over quantised weights. Write plain ones: --dtype bfloat16."]
        return []
    if view is None or form == "adapter" or recipe.dtype is not None:
        return []
    if not edit.has_low_rank:
        return [
            f"{mirrored.role} ({mirrored.title}) is quantised ({view.description}), and {edit.method} writes plain weights only. "
            "Pass --dtype bfloat16, or give the weights that it was quantised from."
        ]
    return [
        f"{mirrored.role} ({mirrored.title}) is quantised ({view.description}): rounded back to that form an edit is lost, or drowns in noise "
        "(docs/quantised.md). Pass --as-adapter, which keeps it exactly beside these weights; --dtype bfloat16, which writes a plain model; or "
        "--requantise, which keeps the form and reports what is left of the edit."
    ]


def form_warnings(checkpoints: Iterable[Checkpoint]) -> list[str]:
    quantised = quantised_among(checkpoints)
    if not quantised:
        return []
    forms = dict.fromkeys(view.description for view in map(quantised_form, quantised) if view is not None)
    return [
        f"{_named(quantised)}: quantised ({'; '.join(forms)}). The error of that is part of every delta, and directions below it are noise "
        "(docs/quantised.md). Where there are bfloat16 weights, give those."
    ]


def _named(checkpoints: list[Checkpoint]) -> str:
    return " and ".join(f"{checkpoint.role} ({checkpoint.title})" for checkpoint in checkpoints)


def form_record(checkpoints: Mapping[str, Checkpoint], requantised: QuantisedCheckpoint | None, tensors: list[dict[str, Any]]) -> dict[str, Any]:
    """For the manifest: the form of each quantised source and, where it was kept, what became of the edit in it; {} for plain sources.

    gain: Σ⟨R, T⟩/Σ‖T‖²; cosine: of all of R with all of T; noise: ‖R − T‖/‖T‖. None where nothing was written in that form.
    """
    forms = {role: view.description for role, checkpoint in checkpoints.items() if (view := quantised_form(checkpoint)) is not None}
    if not forms:
        return {}
    record: dict[str, Any] = {"sources": forms}
    if requantised is not None:
        codes = requantised.by_codes
        found = [matrix["realised"] for tensor in tensors if tensor["name"] in codes for matrix in tensor.get("matrices", ()) if matrix["realised"]]
        intended = math.fsum(one["intended_norm"] ** 2 for one in found)
        realised = math.fsum(one["realised_norm"] ** 2 for one in found)
        product = math.fsum(one["gain"] * one["intended_norm"] ** 2 for one in found if one["gain"] is not None)
        record["requantised"] = {
            "scales": "kept",
            "gain": product / intended if intended else None,
            "cosine": product / math.sqrt(intended * realised) if intended and realised else None,
            "noise": math.sqrt(max(0.0, realised - 2 * product + intended) / intended) if intended else None,
        }
    return {"quantised": record}


def requantised_text(manifest: Mapping[str, Any], wanted_gain: float) -> str | None:
    """A warning of what the quantised form did to the edit; None where none was written in it."""
    found = manifest.get("quantised", {}).get("requantised")
    if found is None or found["noise"] is None:
        return None
    cosine = "" if found["cosine"] is None else f" (cosine {found['cosine']:.2f})"
    less = "" if found["gain"] >= wanted_gain else " --rounding stochastic keeps the gain near 1, with more error."
    return (
        f"written in the quantised form, the edit has a gain of {found['gain']:.3f} and an error of {found['noise']:.1f} times its own "
        f"norm{cosine}.{less} --as-adapter has neither loss nor error."
    )
