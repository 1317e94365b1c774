"""Objects named by a text, `module:attribute` or `file.py:attribute`, and the threshold for the scores they give."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from lox_merge.errors import RequestError


def load_object(text: str, role: str) -> Any:
    """The attribute that `text` names. Raises RequestError saying which part is missing."""
    place, separator, attribute = text.rpartition(":")
    if not separator or not place or not attribute:
        raise RequestError(f"{role} {text!r} is not module:name or file.py:name.")
    module = _from_file(Path(place), role) if place.endswith(".py") else _from_name(place, role)
    value = getattr(module, attribute, None)
    if value is None:
        raise RequestError(f"{role}: {place} has no {attribute!r}.")
    return value


def finite_threshold(threshold: float) -> float:
    """`threshold` where a score can reach it or not. Raises RequestError: every score is below NaN, so no attack would count as a success."""
    if not math.isfinite(threshold):
        raise RequestError(f"the threshold {threshold} is not a finite number. Give the score from which an attack counts as a success, such as 0.5.")
    return threshold


def source_hash(text: str, value: Any) -> str | None:
    """sha256 of the file that `text` names, and of the one that defines `value` where that is another; None where there is neither.

    A decorator's own file says nothing about the function under it.
    """
    place = text.rpartition(":")[0]
    named = place if place.endswith(".py") else getattr(sys.modules.get(place), "__file__", None)
    paths = dict.fromkeys(Path(file).resolve() for file in (named, _defining_file(value)) if file and Path(file).is_file())
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest() if digests else None


def _defining_file(value: Any) -> str | None:
    while isinstance(value, functools.partial):
        value = value.func
    value = inspect.unwrap(value)
    for definition in (value, type(value)):
        try:
            return inspect.getsourcefile(definition)
        except TypeError:  # an instance, or built in
            continue
    return None


def _from_name(name: str, role: str) -> Any:
    # As `python -m` does: modules beside the user's work are found.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        with redirect_stdout(sys.stderr):
            return importlib.import_module(name)
    except ImportError as error:
        raise RequestError(f"{role}: the module {name} can't be imported: {error}. Check its name, and that it is installed.") from error
    except (Exception, SystemExit) as error:
        raise RequestError(f"{role}: the module {name} fails when it is imported: {type(error).__name__}: {error}") from error


def _from_file(file: Path, role: str) -> Any:
    if not file.is_file():
        raise RequestError(f"{role}: there is no file {file}.")
    name = f"lox_merge_user_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    specification = importlib.util.spec_from_file_location(name, file)
    if specification is None or specification.loader is None:
        raise RequestError(f"{role}: {file} is not a Python file.")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses and pickling look a class's module up by name
    try:
        # What it prints is not for standard output, where --json may write.
        with redirect_stdout(sys.stderr):
            specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise RequestError(f"{role}: {file} fails when it is run: {type(error).__name__}: {error}") from error
    return module
