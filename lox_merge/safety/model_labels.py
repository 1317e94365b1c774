"""What results and tables call the models of a comparison: base, aligned, and the others by their own names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from lox_merge.errors import RequestError
from lox_merge.safety.loading import LoadedModel
from lox_merge.safety.model_set import Reference

BASE, ALIGNED = "base", "aligned"
AnyReference = TypeVar("AnyReference", str, Path, str | Path, Reference)


def labelled(models: Sequence[Reference] | Mapping[str, Reference]) -> dict[str, Reference]:
    """Labels of models beyond base and aligned: given ones, else as `told_apart`. Raises RequestError for a label that is taken."""
    if isinstance(models, Mapping):
        if taken := sorted({BASE, ALIGNED} & models.keys()):
            raise RequestError(f"the label {taken[0]!r} is taken. Call the model another name.")
        return dict(models)
    return told_apart(models, taken=(BASE, ALIGNED))


def told_apart(models: Sequence[AnyReference], *, taken: Sequence[str] = ()) -> dict[str, AnyReference]:
    """Names of folders, Hub ids and titles, told apart by a number."""
    found: dict[str, AnyReference] = {}
    for model in models:
        name, number = _name(model), 2
        label = name
        while label in found or label in taken:
            label, number = f"{name} ({number})", number + 1
        found[label] = model
    return found


def _name(model: Reference) -> str:
    if isinstance(model, LoadedModel):
        return model.title
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else str(model)
