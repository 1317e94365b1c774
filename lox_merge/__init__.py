"""lox-merge: make safety alignment harder to fine-tune away, and measure whether it worked.

Names are imported on first use, so that `import lox_merge` and `lox-merge --help` do not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lox_merge._version import __version__

if TYPE_CHECKING:
    from lox_merge.diagnostics.activations.results import Activations
    from lox_merge.diagnostics.activations.run import activations
    from lox_merge.diagnostics.behaviour.results import Behaviour
    from lox_merge.diagnostics.behaviour.run import behaviour
    from lox_merge.diagnostics.behaviour.texts import Prefix
    from lox_merge.diagnostics.curvature.job import Curvature, curvature
    from lox_merge.diagnostics.curvature.settings import CurvatureSettings
    from lox_merge.diagnostics.framing.job import framing
    from lox_merge.diagnostics.framing.results import Framing
    from lox_merge.diagnostics.settings import InspectSettings
    from lox_merge.diagnostics.watch.callback import AlignmentWatch
    from lox_merge.diagnostics.weights import Inspection, inspect
    from lox_merge.errors import LoxMergeError
    from lox_merge.jobs.filter_recipe import FilterRecipe
    from lox_merge.jobs.harden import HardenResult, harden
    from lox_merge.jobs.project import ProjectResult, project
    from lox_merge.jobs.recipe import Recipe
    from lox_merge.maths.edits import lox
    from lox_merge.maths.filter import filter_matrix
    from lox_merge.maths.spectral import truncated_svd
    from lox_merge.maths.subspace import Subspace
    from lox_merge.safety.brittleness import Brittleness
    from lox_merge.safety.brittleness_job import brittleness
    from lox_merge.safety.landscape.results import Landscape
    from lox_merge.safety.landscape.run import landscape

_HOMES = {
    "Brittleness": "lox_merge.safety.brittleness",
    "Activations": "lox_merge.diagnostics.activations.results",
    "Behaviour": "lox_merge.diagnostics.behaviour.results",
    "AlignmentWatch": "lox_merge.diagnostics.watch.callback",
    "Curvature": "lox_merge.diagnostics.curvature.job",
    "CurvatureSettings": "lox_merge.diagnostics.curvature.settings",
    "FilterRecipe": "lox_merge.jobs.filter_recipe",
    "Framing": "lox_merge.diagnostics.framing.results",
    "HardenResult": "lox_merge.jobs.harden",
    "InspectSettings": "lox_merge.diagnostics.settings",
    "Inspection": "lox_merge.diagnostics.weights",
    "Landscape": "lox_merge.safety.landscape.results",
    "LoxMergeError": "lox_merge.errors",
    "Prefix": "lox_merge.diagnostics.behaviour.texts",
    "ProjectResult": "lox_merge.jobs.project",
    "Recipe": "lox_merge.jobs.recipe",
    "Subspace": "lox_merge.maths.subspace",
    "brittleness": "lox_merge.safety.brittleness_job",
    "activations": "lox_merge.diagnostics.activations.run",
    "behaviour": "lox_merge.diagnostics.behaviour.run",
    "curvature": "lox_merge.diagnostics.curvature.job",
    "filter_matrix": "lox_merge.maths.filter",
    "framing": "lox_merge.diagnostics.framing.job",
    "harden": "lox_merge.jobs.harden",
    "inspect": "lox_merge.diagnostics.weights",
    "landscape": "lox_merge.safety.landscape.run",
    "lox": "lox_merge.maths.edits",
    "project": "lox_merge.jobs.project",
    "truncated_svd": "lox_merge.maths.spectral",
}

__all__ = [
    "Activations",
    "AlignmentWatch",
    "Behaviour",
    "Brittleness",
    "Curvature",
    "CurvatureSettings",
    "FilterRecipe",
    "Framing",
    "HardenResult",
    "InspectSettings",
    "Inspection",
    "Landscape",
    "LoxMergeError",
    "Prefix",
    "ProjectResult",
    "Recipe",
    "Subspace",
    "__version__",
    "activations",
    "behaviour",
    "brittleness",
    "curvature",
    "filter_matrix",
    "framing",
    "harden",
    "inspect",
    "landscape",
    "lox",
    "project",
    "truncated_svd",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
