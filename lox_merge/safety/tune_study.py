"""An optuna study of a tuning in a file: opened for the request it was made for, and read back as figures."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lox_merge.checkpoint.json_text import parse_json
from lox_merge.errors import RequestError
from lox_merge.jobs.atomic import write_error
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.recorded import sources_damage
from lox_merge.safety.line_store import hold
from lox_merge.safety.tuning import TuneSpace, TuneTrial, Tuning
from lox_merge.safety.types import AttackSuccess

STUDY = "lox-merge tune"
# How optuna begins every record of a journal.
_BEGINNING = b'{"op_code":'
# Keys of what a study and its trials carry beside optuna's own figures.
IDENTITY, ALIGNED_KEY, ATTACK, FAILURE, SECONDS = "identity", "aligned", "attack", "failure", "seconds"

_NO_OBJECT = "it is no object"


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _Space(_Part):
    ranks: tuple[int, int]
    alphas: tuple[float, float]
    groups: tuple[str, ...]


class _Asked(_Part):
    space: _Space
    recipe: dict[str, Any]


class _Study(_Part):
    """What is read of the figures that a study carries."""

    identity: _Asked
    aligned: AttackSuccess


class _Trial(_Part):
    """What is read of a finished trial's figures, and optuna's own of it."""

    attack: AttackSuccess
    seconds: float
    values: tuple[float, float]


def check_tune_packages() -> None:
    """Raises RequestError where optuna is not installed."""
    try:
        importlib.import_module("optuna")
    except ImportError as error:
        raise RequestError(f"choosing rank and alpha needs the package optuna ({error}). Install it: pip install 'lox-merge[tune]'.") from error


@contextmanager
def held_study(file: Path | None) -> Iterator[None]:
    """A study's file for this process alone, for the time of a `with` statement; others may read it. None: in memory, nothing to hold.

    Raises RequestError where another process has it or its folder is not there, WriteError where the disk fails.
    """
    if file is None:
        yield
        return
    if not file.resolve().parent.is_dir():
        raise RequestError(f"--study {file}: there is no folder {file.parent}. Make it first.")
    try:
        # optuna has a lock of its own (FILE.lock) while it writes a record; this one is .FILE.lock.
        lock = hold(file.resolve(), "the study")
    except OSError as error:
        raise write_error(file, error) from error
    try:
        yield
    finally:
        lock.release()


def open_study(file: Path | None, identity: dict[str, Any] | None, seed: int) -> Any:
    """The study in a file (an optuna journal), or a new one; None: in memory. identity: None takes the file's as it is, and only reads it.

    Unless it is only read, it has to be held (`held_study`); a last line that was cut short by a crash is dropped. Raises RequestError for a
    study of other models, data or settings, and for a file that is no study or is damaged, WriteError where the disk fails.
    """
    optuna = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = None
    if file is not None:
        if identity is None and not file.is_file():
            raise RequestError(f"there is no study {file}. Make it: lox-merge search BASE ALIGNED --tune --study {file.name} …")
        journal = importlib.import_module("optuna.storages.journal")
        whole = _whole_length(file)
        try:
            storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(file)))
            storage.get_all_studies()
        except Exception as error:  # whatever a file of another kind makes of its reader
            raise RequestError(f"{file.name} is not a study of lox-merge search --tune ({type(error).__name__}). Name another file.") from error
        if identity is not None and whole < file.stat().st_size:  # optuna would write its next record into the same line
            try:
                with file.open("r+b") as journal_file:
                    journal_file.truncate(whole)
            except OSError as error:
                raise write_error(file, error) from error
    if STUDY in optuna.get_all_study_names(storage):
        study = optuna.load_study(study_name=STUDY, storage=storage)
        if study.directions != [optuna.study.StudyDirection.MINIMIZE] * 2:
            raise _damaged(_name(file), "directions: not two that are minimised")
    elif identity is None:
        raise RequestError(f"{_name(file)} holds no study of lox-merge search --tune. Name the file given as --study.")
    else:
        study = optuna.create_study(storage=storage, study_name=STUDY, directions=["minimize", "minimize"])
    if identity is not None:
        _check_asked(study, identity, _name(file))
    # A sampler that began anew from one seed would propose the first trials again; numpy takes 32 bits.
    study.sampler = optuna.samplers.TPESampler(seed=(seed + len(study.trials)) % 2**32)
    return study


def _check_asked(study: Any, identity: dict[str, Any], name: str) -> None:
    """Makes a new study one of this request. Raises RequestError for one of another request, and for figures that could not be read at the end."""
    there = study.user_attrs.get(IDENTITY)
    if there is None and ALIGNED_KEY not in study.user_attrs:
        study.set_user_attr(IDENTITY, identity)
        return
    if not isinstance(there, dict):
        raise _damaged(name, f"{IDENTITY}: {_NO_OBJECT}")
    if there != identity:
        different = ", ".join(key for key in identity | there if there.get(key) != identity.get(key))
        raise RequestError(f"{name} is of another request (different: {different}). Name another file, or ask as before.")
    if ALIGNED_KEY in study.user_attrs:
        tuning_of(study, name)


def _whole_length(file: Path) -> int:
    """How many bytes of a study's file are whole lines. Raises RequestError where one of them is no record, or the file is somebody's data.

    optuna takes a broken last line for one that is still being written, and would append to a stranger's file.
    """
    try:
        data = file.read_bytes() if file.exists() else b""
    except OSError as error:
        raise RequestError(f"{file} can't be read: {error.strerror}.") from error
    whole = data.rfind(b"\n") + 1
    damaged = [number for number, line in enumerate(data[:whole].split(b"\n")[:-1], 1) if not _is_record(line)]
    if damaged[:1] == [1] or not (whole or data.startswith(_BEGINNING[: len(data)])):
        raise RequestError(f"{file.name} is not a study of lox-merge search --tune. Name another file; this one was left as it was.")
    if damaged:
        raise RequestError(
            f"{file.name}, line {damaged[0]}, is not a record of a study. Remove that line and those after it, which build on it, "
            "or name another file."
        )
    return whole


def _is_record(line: bytes) -> bool:
    try:
        record = parse_json(line)
    except ValueError:
        return False
    return isinstance(record, dict) and "op_code" in record


def read_study(file: Path) -> Tuning:
    """A study as it is, to pick from. Raises RequestError."""
    check_tune_packages()
    found = tuning_of(open_study(file, None, 0), file.name)
    if damage := sources_damage(found.identity.get("sources")):
        raise _damaged(file.name, f"{IDENTITY}.sources: {damage}")
    return found


def _name(file: Path | None) -> str:
    return file.name if file else "the study"


def tuning_of(study: Any, name: str = "the study") -> Tuning:
    """A study's trials with their figures. Raises RequestError where aligned was not measured yet, or what is there is not as it was kept."""
    if ALIGNED_KEY not in study.user_attrs:
        raise RequestError("the study was interrupted before the aligned model was measured; run it again to go on.")
    optuna = importlib.import_module("optuna")
    with _as_kept(name):
        kept = _Study.model_validate(study.user_attrs)
        space, recipe = TuneSpace(**kept.identity.space.model_dump()), Recipe.from_json(kept.identity.recipe)
    trials = []
    for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE]):
        with _as_kept(name, f"trial {trial.number}: "):
            figures = _Trial.model_validate({**trial.user_attrs, "values": trial.values})
            setting = space.recipe(trial.params, recipe)
        trials.append(TuneTrial(trial.number, setting, figures.attack, figures.values[1], on_front=False, seconds=figures.seconds))
    with _as_kept(name):
        best = {trial.number for trial in study.best_trials}
    return Tuning(
        identity=study.user_attrs[IDENTITY],
        aligned=kept.aligned,
        trials=tuple(replace(trial, on_front=trial.number in best) for trial in trials),
        failed={
            trial.number: trial.user_attrs.get(FAILURE, "interrupted")
            for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.FAIL])
        },
    )


@contextmanager
def _as_kept(name: str, part: str = "") -> Iterator[None]:
    """Whatever is wrong with figures of a study's file is a RequestError that says where."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        words = {"missing": "missing", "model_type": _NO_OBJECT, "dataclass_type": _NO_OBJECT}
        raise _damaged(name, f"{part}{'.'.join(map(str, first['loc']))}: {words.get(first['type'], first['msg'])}") from error
    except KeyError as error:
        raise _damaged(name, f"{part}{error.args[0]}: missing") from error
    except (RequestError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(name, f"{part}{error}") from error


def _damaged(name: str, what: str) -> RequestError:
    return RequestError(f"{name} is not as it was kept ({what.rstrip('.')}). Restore it, or name another file.")
