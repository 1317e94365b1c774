"""What `lox-merge verify --json` writes."""

from __future__ import annotations

from lox_merge.publish.documents.shape import Shape


class Verification(Shape):
    """An output against its manifest and its sources."""

    ok: bool
    output: str
    files: int
    tensors: int
    tensors_recomputed: int
    rounded_apart: tuple[str, ...]
    problems: tuple[str, ...]
    sources_checked: bool
