"""The edits by the name that a manifest has for them, for making an output again from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lox_merge.errors import RequestError
from lox_merge.jobs.edit import Edit
from lox_merge.jobs.lox_edit import LoxEdit
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.settings import Settings


def recorded_edit(job: Mapping[str, Any]) -> tuple[Settings, Edit]:
    """Recipe and edit of a manifest's job. Raises RequestError for a method that this version does not know."""
    if job["method"] == "lox":
        recipe = Recipe.from_json(job["recipe"])
        return recipe, LoxEdit(recipe)
    raise RequestError(f"the manifest's method {job['method']!r} is not known to this version; use the version that wrote it.")
