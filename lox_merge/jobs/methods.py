"""The edits by the name that a manifest has for them, for making an output again from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lox_merge.errors import RequestError
from lox_merge.jobs.edit import Edit
from lox_merge.jobs.filter_edit import FilterEdit
from lox_merge.jobs.filter_recipe import FilterRecipe
from lox_merge.jobs.filter_record import least_similar_on_record
from lox_merge.jobs.lox_edit import LoxEdit
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.settings import Settings


def recorded_edit(manifest: Mapping[str, Any]) -> tuple[Settings, Edit]:
    """Recipe and edit of a manifest. Raises RequestError for a method that this version does not know."""
    job = manifest["job"]
    if job["method"] == "lox":
        recipe = Recipe.from_json(job["recipe"])
        return recipe, LoxEdit(recipe)
    if job["method"] == "project":
        filter_recipe = FilterRecipe.from_json(job["recipe"])
        # Which layers are the least similar follows from the cosines on record, and each of those is compared with its own matrix.
        chosen = least_similar_on_record(manifest["tensors"], filter_recipe.layers) if filter_recipe.layers else None
        return filter_recipe, FilterEdit(filter_recipe, chosen)
    raise RequestError(f"the manifest's method {job['method']!r} is not known to this version; use the version that wrote it.")
