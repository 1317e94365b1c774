"""What results and tables call the models of a comparison: base, aligned, and the others by their own names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lox_merge.errors import RequestError
from lox_merge.safety.loading import LoadedModel
from lox_merge.safety.model_set import Reference

BASE, ALIGNED = "base", "aligned"


def labelled(models: Sequence[Reference] | Mapping[str, Reference]) -> dict[str, Reference]:
    """Labels of models beyond base and aligned: given ones, else names of folders, Hub ids and titles, told apart by a number.

    Raises RequestError for a label that is taken.
    """
    if isinstance(models, Mapping):
        if taken := sorted({BASE, ALIGNED} & models.keys()):
            raise RequestError(f"the label {taken[0]!r} is taken. Call the model another name.")
        return dict(models)
    found: dict[str, Reference] = {}
    for model in models:
        name, number = _name(model), 2
        label = name
        while label in found or label in (BASE, ALIGNED):
            label, number = f"{name} ({number})", number + 1
        found[label] = model
    return found


def _name(model: Reference) -> str:
    if isinstance(model, LoadedModel):
        return model.title
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else str(model)
