"""The section of a verification."""

from __future__ import annotations

from typing import Any

from lox_merge.publish.documents.shape import read_as
from lox_merge.publish.documents.verification import Verification
from lox_merge.publish.report.numbers import counted, listed
from lox_merge.publish.report.section import Section, Table, heads, without_empty, word


def verification_sections(document: dict[str, Any], name: str) -> list[Section]:
    """Whether an output is what its manifest says. Raises RequestError."""
    result = read_as(Verification, document, name)
    if result.ok:
        summary = f"{result.output} is what its manifest says: {counted(result.files, 'file')} and {counted(result.tensors, 'tensor')}."
    else:
        summary = f"{result.output} is NOT what its manifest says: {counted(len(result.problems), 'problem')}."
    recomputed = f"{counted(result.tensors_recomputed, 'tensor')} of {result.tensors} made again from the sources and compared."
    words = (
        recomputed if result.sources_checked else "The weights were not made again from the sources: only hashes and structure were checked.",
        f"In the last place, as another machine or thread count rounds them, differ here and there: {listed(result.rounded_apart)}."
        if result.rounded_apart
        else None,
    )
    rows = tuple((word(str(place)), word(problem)) for place, problem in enumerate(result.problems, 1))
    tables = (Table("Problems", heads("number", "problem"), rows),) if rows else ()
    return [Section("Verification", summary, without_empty(words), ("That the model is safe: only that it is what was made.",), tables=tables)]
