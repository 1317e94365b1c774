"""An optuna study of a tuning in a file: opened for the request it was made for, and read back as figures."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

from lox_merge.errors import RequestError
from lox_merge.jobs.recipe import Recipe
from lox_merge.safety.tuning import TuneSpace, TuneTrial, Tuning
from lox_merge.safety.types import AttackSuccess

STUDY = "lox-merge tune"
# Keys of what a study and its trials carry beside optuna's own figures.
IDENTITY, ALIGNED_KEY, ATTACK, FAILURE, SECONDS = "identity", "aligned", "attack", "failure", "seconds"


def check_tune_packages() -> None:
    """Raises RequestError where optuna is not installed."""
    try:
        importlib.import_module("optuna")
    except ImportError as error:
        raise RequestError(f"choosing rank and alpha needs the package optuna ({error}). Install it: pip install 'lox-merge[tune]'.") from error


def open_study(file: Path | None, identity: dict[str, Any] | None, seed: int) -> Any:
    """The study in a file (an optuna journal), or a new one; None: in memory. identity: None takes the file's as it is.

    Raises RequestError for a study of other models, data or settings, and for a file that is no study.
    """
    optuna = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = None
    if file is not None:
        if identity is None and not file.is_file():
            raise RequestError(f"there is no study {file}. Make it: lox-merge search BASE ALIGNED --tune --study {file.name} …")
        if not file.resolve().parent.is_dir():
            raise RequestError(f"--study {file}: there is no folder {file.parent}. Make it first.")
        journal = importlib.import_module("optuna.storages.journal")
        try:
            # optuna takes a broken only line for one that is still being written, and would append to a stranger's file.
            with file.open("rb") if file.exists() else io.BytesIO() as there_already:
                if b"op_code" not in (first := there_already.readline()) and first:
                    raise ValueError("no journal")
            storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(file)))
            storage.get_all_studies()
        except Exception as error:  # whatever a file of another kind makes of its reader
            raise RequestError(f"{file.name} is not a study of lox-merge search --tune ({type(error).__name__}). Name another file.") from error
    if identity is None and not any(found.study_name == STUDY for found in optuna.get_all_study_summaries(storage)):
        raise RequestError(f"{_name(file)} holds no study of lox-merge search --tune. Name the file given as --study.")
    study = optuna.create_study(storage=storage, study_name=STUDY, directions=["minimize", "minimize"], load_if_exists=True)
    there = study.user_attrs.get(IDENTITY)
    if identity is not None and there is None:
        study.set_user_attr(IDENTITY, identity)
    elif identity is not None and there != identity:
        different = ", ".join(key for key in identity if there.get(key) != identity[key])
        raise RequestError(f"{_name(file)} is of another request (different: {different}). Name another file, or ask as before.")
    # A sampler that began anew from one seed would propose the first trials again; numpy takes 32 bits.
    study.sampler = optuna.samplers.TPESampler(seed=(seed + len(study.trials)) % 2**32)
    return study


def read_study(file: Path) -> Tuning:
    """A study as it is, to pick from. Raises RequestError."""
    check_tune_packages()
    study = open_study(file, None, 0)
    return tuning_of(study)


def _name(file: Path | None) -> str:
    return file.name if file else "the study"


def tuning_of(study: Any) -> Tuning:
    """A study's trials with their figures. Raises RequestError where aligned was not measured yet."""
    identity = study.user_attrs[IDENTITY]
    if ALIGNED_KEY not in study.user_attrs:
        raise RequestError("the study was interrupted before the aligned model was measured; run it again to go on.")
    optuna = importlib.import_module("optuna")
    space = TuneSpace(tuple(identity["space"]["ranks"]), tuple(identity["space"]["alphas"]), tuple(identity["space"]["groups"]))
    recipe = Recipe.from_json(identity["recipe"])
    best = {trial.number for trial in study.best_trials}
    complete = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    return Tuning(
        identity=identity,
        aligned=_success(study.user_attrs[ALIGNED_KEY]),
        trials=tuple(
            TuneTrial(
                number=trial.number,
                recipe=space.recipe(trial.params, recipe),
                attack=_success(trial.user_attrs[ATTACK]),
                divergence=trial.values[1],
                on_front=trial.number in best,
                seconds=trial.user_attrs[SECONDS],
            )
            for trial in complete
        ),
        failed={
            trial.number: trial.user_attrs.get(FAILURE, "interrupted")
            for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.FAIL])
        },
    )


def _success(values: dict[str, Any]) -> AttackSuccess:
    interval = values["interval"]
    return AttackSuccess(**{**values, "interval": None if interval is None else (interval[0], interval[1])})
