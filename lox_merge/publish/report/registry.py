"""Which sections a run gives. A new command adds one line here and one file beside this one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lox_merge.errors import RequestError
from lox_merge.publish.report.activations import activations_sections
from lox_merge.publish.report.attack_success import attack_success_sections
from lox_merge.publish.report.behaviour import behaviour_sections
from lox_merge.publish.report.brittleness import brittleness_sections
from lox_merge.publish.report.curvature import curvature_sections
from lox_merge.publish.report.decomposition import decomposition_sections
from lox_merge.publish.report.demo import demo_sections, full_demo_sections
from lox_merge.publish.report.framing import framing_sections
from lox_merge.publish.report.hardening import hardening_sections
from lox_merge.publish.report.inspection import inspection_sections
from lox_merge.publish.report.landscape import landscape_sections
from lox_merge.publish.report.projection import projection_sections
from lox_merge.publish.report.robustness import robustness_sections
from lox_merge.publish.report.runs import Run
from lox_merge.publish.report.search import search_sections
from lox_merge.publish.report.section import Section
from lox_merge.publish.report.tuning import tuning_sections
from lox_merge.publish.report.verification import verification_sections

# Command: function of its document and a name for messages.
_SECTIONS: dict[str, Callable[[dict[str, Any], str], list[Section]]] = {
    "activations": activations_sections,
    "asr": attack_success_sections,
    "brittleness": brittleness_sections,
    "behaviour": behaviour_sections,
    "curvature": curvature_sections,
    "decompose": decomposition_sections,
    "demo": demo_sections,
    "demo --full": full_demo_sections,
    "framing": framing_sections,
    "harden": hardening_sections,
    "inspect": inspection_sections,
    "landscape": landscape_sections,
    "manifest": hardening_sections,
    "project": projection_sections,
    "robustness": robustness_sections,
    "search": search_sections,
    "search --tune": tuning_sections,
    "verify": verification_sections,
}


def sections_of(run: Run) -> list[Section]:
    """Raises RequestError for a run of no known command, or whose fields are not those of this version."""
    command = run.command
    if command not in _SECTIONS:
        known = ", ".join(name for name in _SECTIONS if name != "manifest")
        what = f"is of the command {command!r}" if command else "does not say of which command it is"
        raise RequestError(f"{run.name} {what}. A report can be made of the JSON of: {known}; and of a hardened model's lox_merge.json.")
    return _SECTIONS[command](run.document, run.name)
