"""Points kept in a JSONL file while they are measured, so that an interrupted landscape goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lox_merge.errors import RequestError
from lox_merge.jobs.atomic import write_error
from lox_merge.safety.landscape.results import PointResult

_FORMAT = "lox-merge landscape points 1"
Key = tuple[str, tuple[float, ...]]
ANCHOR: Key = ("", ())


class PointStore:
    """First line: of which models, prompts, judges and settings the points are. Every further line: one measured point.

    Opening raises RequestError where the file is of another request or not of this kind. A last line that was cut short by a crash
    is dropped. Other slices of the same models may share a file: a point is known by its direction and coordinates.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self._about = path, about
        self._points: dict[Key, PointResult] = {}
        try:
            self._open()
        except OSError as error:
            raise write_error(path, error) from error

    def get(self, key: Key) -> PointResult | None:
        return self._points.get(key)

    def append(self, key: Key, point: PointResult) -> None:
        """Keeps a point; on disk when this returns. Raises WriteError."""
        try:
            self._write([{"slice": key[0], "at": list(key[1]), "point": point.to_json()}], "ab")
        except OSError as error:
            raise write_error(self.path, error) from error
        self._points[key] = point

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = self.path.read_bytes() if self.path.exists() else b""
        header = {"format": _FORMAT, "request": digest(self._about), "about": self._about}
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]
        if not lines:
            # A file without a whole first line is new, or its first write was cut short: anything else is somebody's data.
            if data and not _encode(header).startswith(data):
                raise self._foreign()
            self._write([header], "wb")
            return
        self._check(lines[0], header)
        for number, line in enumerate(lines[1:], 2):
            try:
                value = json.loads(line)
                self._points[value["slice"], tuple(value["at"])] = PointResult.from_json(value["point"])
            except (ValueError, KeyError, TypeError, AttributeError):
                raise RequestError(f"{self.path.name}, line {number}, is not a point. Remove that line, or name another file.") from None
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    def _check(self, line: bytes, header: dict[str, Any]) -> None:
        try:
            held = json.loads(line)
        except ValueError:
            held = None
        if not isinstance(held, dict) or held.get("format") != _FORMAT:
            raise self._foreign()
        if held.get("request") != header["request"]:
            about = held.get("about") if isinstance(held.get("about"), dict) else {}
            differs = [key for key in self._about if (about or {}).get(key) != self._about[key]]
            raise RequestError(
                f"{self.path.name} holds points of another request (different: {', '.join(differs)}). Name another file, or remove this one to "
                "start anew."
            )

    def _foreign(self) -> RequestError:
        return RequestError(f"{self.path.name} is not a file of landscape points. Name another file; this one was left as it is.")

    def _write(self, lines: Sequence[dict[str, Any]], mode: str) -> None:
        with self.path.open(mode) as file:
            file.write(b"".join(_encode(line) for line in lines))
            file.flush()
            os.fsync(file.fileno())


def digest(value: Any) -> str:
    """sha256 of plain JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _encode(line: dict[str, Any]) -> bytes:
    return (json.dumps(line, ensure_ascii=True, allow_nan=False) + "\n").encode()
