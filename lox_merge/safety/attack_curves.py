"""Curves of models under attack, and a folder that keeps them: one is hours of training, and a run has several."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lox_merge.checkpoint.json_text import parse_json
from lox_merge.errors import RequestError, SourceError
from lox_merge.jobs.atomic import json_bytes, write_atomically
from lox_merge.safety import asr
from lox_merge.safety.dispersion import Ratio
from lox_merge.safety.line_store import digest
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
        """Raises RequestError where a file is in the way."""
        blocking = next((place for place in (folder, *folder.parents) if place.exists() and not place.is_dir()), None)
        if blocking is not None:
            raise RequestError(f"{blocking} is a file; name a folder to keep curves in.")
        self._folder = folder

    def find(self, about: Mapping[str, Any]) -> Curve | None:
        """The curve that was kept for the same `about`. Raises RequestError for a file that is damaged or cannot be read."""
        path = self._path(about)
        if not path.is_file():
            return None
        try:
            document = parse_json(path.read_bytes())
            if not isinstance(document, dict) or document["format"] != _FORMAT or digest(document["about"]) != digest(about):
                raise ValueError("it is of something else")
            return _curve_from(document["curve"])
        except OSError as error:
            raise RequestError(f"{path} can't be read: {error.strerror}.") from error
        except (KeyError, TypeError, ValueError, AttributeError, RequestError, SourceError) as error:
            raise RequestError(
                f"{path} is not a curve as it was kept ({type(error).__name__}: {error}). Remove it to train that model again."
            ) from error

    def keep(self, about: Mapping[str, Any], curve: Curve) -> None:
        """On disk when this returns. Raises WriteError."""
        write_atomically(self._path(about), json_bytes({"format": _FORMAT, "about": dict(about), "curve": _curve_json(curve)}), self._folder)

    def _path(self, about: Mapping[str, Any]) -> Path:
        attack = re.sub(r"[^A-Za-z0-9.-]+", "-", str(about["attack"]["name"])).strip("-.")[:40]
        return self._folder / f"{attack}-{about['model']}-{about['seed']}-{digest(about)[:16]}.json"


def _curve_json(curve: Curve) -> dict[str, Any]:
    points = [
        {"step": point.step, "evaluation": asr.to_json(point.evaluation), "r_ft": asdict(point.r_ft), "utility": dict(point.utility)}
        for point in curve.points
    ]
    named = {"attack": curve.attack, "model": curve.model, "seed": curve.seed}
    return {**named, "r_align": asdict(curve.r_align), "points": points, "batches": list(curve.batches)}


def _curve_from(document: dict[str, Any]) -> Curve:
    points = tuple(
        Point(point["step"], asr.from_json(point["evaluation"]), Ratio(**point["r_ft"]), dict(point["utility"])) for point in document["points"]
    )
    named = document["attack"], document["model"], document["seed"]
    return Curve(*named, Ratio(**document["r_align"]), points, tuple(document["batches"]))
