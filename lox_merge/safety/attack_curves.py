"""Curves of models under attack, and a folder that keeps them: one is hours of training, and a run has several."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lox_merge.checkpoint.json_text import parse_json
from lox_merge.errors import Interrupted, RequestError, SourceError
from lox_merge.jobs.atomic import json_bytes, write_atomically
from lox_merge.safety.dispersion import Ratio
from lox_merge.safety.line_store import digest, make_folder
from lox_merge.safety.types import Evaluation

_FORMAT = "lox-merge attack curve 1"


@dataclass(frozen=True)
class Point:
    """A model after `step` steps of an attack. r_ft: see Ratio; utility: what was asked for, None where undefined."""

    step: int
    evaluation: Evaluation = field(repr=False)
    r_ft: Ratio
    utility: Mapping[str, float | None]


@dataclass(frozen=True)
class Curve:
    """One starting point ('aligned', 'LoX' or a control) under one attack with one seed.

    r_align: R of the starting point itself, before the attack. batches: short hashes of the training batches in order, the same for
    every starting point.
    """

    attack: str
    model: str
    seed: int
    r_align: Ratio
    points: tuple[Point, ...]
    batches: tuple[str, ...] = field(repr=False)

    def point(self, step: int) -> Point:
        return next(point for point in self.points if point.step == step)

    def dispersion(self, step: int) -> float | None:
        """R_ft/R_align of the means over matrices; None where undefined."""
        now, before = self.point(step).r_ft.mean, self.r_align.mean
        return None if now is None or not before else now / before


class CurveStore:
    """A folder with a file a curve, named by a hash of all that decides it: another request finds nothing there and takes nothing away."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder. Raises RequestError where nothing can be kept there: hours later it would be too late to say so."""
        try:
            make_folder(folder)
        except OSError as error:
            raise RequestError(f"{folder} can't be made: {error.strerror}. Name another folder to keep curves in.") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RequestError(f"nothing can be written into {folder}. Name another folder to keep curves in.")
        self._folder = folder

    @contextmanager
    def told(self) -> Iterator[None]:
        """Ctrl-C in a `with` statement is told with where to go on from. Raises Interrupted."""
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted. Finished curves are kept in {self._folder}; run the same command again to go on.") from None

    def find(self, about: Mapping[str, Any]) -> Curve | None:
        """The curve that was kept for the same `about`. Raises RequestError for a file that is damaged or cannot be read."""
        path = self._path(about)
        if not path.is_file():
            return None
        try:
            document = parse_json(path.read_bytes())
            if not isinstance(document, dict) or document.get("format") != _FORMAT or digest(document.get("about")) != digest(about):
                raise ValueError("it is of something else")
            curve = TypeAdapter(Curve).validate_python(document.get("curve"))
            if [point.step for point in curve.points] != list(about["training"]["steps"]):
                raise ValueError("it has points at other steps")
        except OSError as error:
            raise RequestError(f"{path} can't be read: {error.strerror}.") from error
        except (ValueError, SourceError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RequestError(f"{path} is not a curve as it was kept ({reason}). Remove it to train that model again.") from error
        return curve

    def keep(self, about: Mapping[str, Any], curve: Curve) -> None:
        """On disk when this returns. Raises WriteError."""
        document = {"format": _FORMAT, "about": dict(about), "curve": TypeAdapter(Curve).dump_python(curve, mode="json")}
        write_atomically(self._path(about), json_bytes(document), self._folder)

    def _path(self, about: Mapping[str, Any]) -> Path:
        attack = re.sub(r"[^A-Za-z0-9.-]+", "-", str(about["attack"]["name"])).strip("-.")[:40]
        return self._folder / f"{attack}-{about['model']}-{about['seed']}-{digest(about)[:16]}.json"
