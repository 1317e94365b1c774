"""Points kept in a JSONL file while they are measured, so that an interrupted landscape goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lox_merge.safety.landscape.results import PointResult
from lox_merge.safety.line_store import LineStore, digest

Key = tuple[str, tuple[float, ...]]
ANCHOR: Key = ("", ())


class PointStore(LineStore):
    """Points of one set of models, prompts, judges and settings; opening raises RequestError where the file is of others.

    Other directions and coordinates of the same request may share a file: a point is known by them.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        super().__init__(path, "landscape points", {part: digest(value) for part, value in about.items()}, "a point", shown={"about": about})
        self._points: dict[Key, PointResult] = {}
        for number, line in enumerate(self.lines, 2):
            try:
                self._points[line["slice"], tuple(line["at"])] = PointResult.from_json(line["point"])
            except (KeyError, TypeError, AttributeError):
                self.close()
                raise self.damaged(number) from None

    def get(self, key: Key) -> PointResult | None:
        return self._points.get(key)

    def keep(self, key: Key, point: PointResult) -> None:
        """Keeps a point; on disk when this returns. Raises WriteError."""
        self.append([{"slice": key[0], "at": list(key[1]), "point": point.to_json()}])
        self._points[key] = point
