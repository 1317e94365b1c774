"""The state of an unfinished run, kept inside the output folder, so that an interruption loses at most one shard."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from filelock import FileLock, Timeout

from lox_merge.checkpoint.checkpoint import SINGLE, SINGLE_INDEX
from lox_merge.checkpoint.json_text import parse_json
from lox_merge.errors import OutputError, SourceChangedError
from lox_merge.jobs.atomic import json_bytes, sha256_of, sync_folder, write_atomically
from lox_merge.jobs.locks import acquire
from lox_merge.jobs.low_disk import DOWNLOADS
from lox_merge.jobs.output_folder import MANIFEST, WORK_FOLDER, check_work_folder
from lox_merge.jobs.store import WEIGHTS_NOTE, Store

_JOB = "job.json"
_LOCK = "lock"
_STORE = "store.json"


class Journal:
    """`.lox_merge/` in the output: the job that is being done, and one record per finished shard.

    A record is written after its shard has its final name, so a shard with a record is whole.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / WORK_FOLDER

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the output for this process; the lock goes with the process, however it ends. Raises OutputError."""
        check_work_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / _LOCK)
        try:
            acquire(lock, timeout=0)
        except Timeout:
            raise OutputError(f"another process is writing {self.out}. Wait for it, or choose another output folder.") from None
        try:
            yield
        finally:
            lock.release()

    def clear(self) -> None:
        """Empties an output of this program, finished or not, but for the lock that is being held."""
        # What makes a folder load as a model goes first: killed halfway, this leaves none that lacks its chat template.
        for entry in sorted(self.out.iterdir(), key=lambda entry: (entry.name not in (MANIFEST, SINGLE_INDEX, SINGLE, "config.json"), entry.name)):
            if entry != self.folder:
                _remove(entry)
        for entry in list(self.folder.iterdir()):
            if entry.name not in (_LOCK, DOWNLOADS):  # downloads are of a commit, whatever the job
                _remove(entry)

    def check(self, job: dict[str, Any]) -> None:
        """Raises OutputError naming what differs when the folder holds another job."""
        there = self._read(self.folder / _JOB) or (self.manifest() or {}).get("job")
        if there is not None and there != job:
            raise OutputError(
                f"{self.out} holds another job: {'; '.join(_differences(there, job)) or 'its settings differ'}. "
                "Give the same settings and sources to go on with it, choose another folder, or pass --overwrite to start anew."
            )

    def check_store(self, store: Store | None) -> None:
        """Raises OutputError where the job that the folder holds has its weights elsewhere than this one."""
        if not self.begun and not (self.out / MANIFEST).exists():
            return
        note = self._read(self.out / WEIGHTS_NOTE) or {}
        there = self.read(_STORE) or {key: note[key] for key in ("repository", "branch") if key in note} or None
        wanted = store.identity if store else None
        if there != wanted:
            before, now = (f"in {place['repository']} on the Hub" if place else "in this folder" for place in (there, wanted))
            raise OutputError(
                f"the weights of {self.out} are {before}, and are to be {now}. Give the same --push and --weights-on-hub as before"
                f"{'' if there else ' (lox-merge push publishes a finished output)'}, choose another folder, or pass --overwrite to start anew."
            )

    def begin(self, job: dict[str, Any], store: Store | None = None) -> None:
        """Starts `job` in a fresh folder, or goes on with the same job."""
        self.check(job)
        if store and self.read(_STORE) is None:
            write_atomically(self.folder / _STORE, json_bytes(store.identity), self.folder)
        if self._read(self.folder / _JOB) is None:
            write_atomically(self.folder / _JOB, json_bytes(job), self.folder)

    @property
    def begun(self) -> bool:
        """Whether a job was begun here and not finished."""
        return self.read(_JOB) is not None

    def job(self) -> dict[str, Any] | None:
        """The job that was begun here and not finished."""
        return self.read(_JOB)

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON object of the working state; None where there is none."""
        return self._read(self.folder / name)

    def manifest(self) -> dict[str, Any] | None:
        """That of a finished output, None where there is none. Raises OutputError for one that is damaged: whose job it was is not known."""
        path = self.out / MANIFEST
        found = self._read(path)
        if not path.exists():
            return found
        damage = _recorded().manifest_damage(found) if found is not None else "no JSON object"
        if damage:
            raise OutputError(f"{path} is damaged ({damage}). Restore it, choose another folder, or pass --overwrite to make the output again.")
        return found

    def finished(self, file: str) -> dict[str, Any] | None:
        """The record of a shard that is whole on disk; None when it has to be written. Checks its hash."""
        record = self._sound(file)
        path = self.out / file
        if record is None or not path.is_file() or path.stat().st_size != record["output"]["size"]:
            return None
        return record if sha256_of(path) == record["output"]["sha256"] else None

    def sent(self, file: str) -> dict[str, Any] | None:
        """The record of a shard that is in the store; None when it has to be made."""
        record = self._sound(file)
        return record if record is not None and record.get("sent") else None

    def _sound(self, file: str) -> dict[str, Any] | None:
        record = self._read(self._record(file))
        return None if record is None or _recorded().record_damage(record) else record

    def forget(self, files: Iterable[str]) -> None:
        """These shards are not where they were sent: the same job makes them again."""
        (self.out / MANIFEST).unlink(missing_ok=True)
        for file in files:
            self._record(file).unlink(missing_ok=True)

    def check_sources(self, record: dict[str, Any], hashes: dict[str, dict[str, str]]) -> None:
        """Raises SourceChangedError when a source of a finished shard is not what it was."""
        for role, files in record["sources"].items():
            for file, digest in files.items():
                if hashes.get(role, {}).get(file) != digest:
                    raise SourceChangedError(
                        f"{role}: {file} is not the file that {record['output']['file']} was made from. "
                        "Restore it, or pass --overwrite to start anew."
                    )

    def record(self, file: str, record: dict[str, Any]) -> None:
        if not record.get("sent"):
            sync_folder((self.out / file).parent)
        write_atomically(self._record(file), json_bytes(record), self.folder)

    def end(self) -> None:
        """The manifest is in place: the working state has served."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def abandon(self, files: Iterable[str]) -> None:
        """Takes back what this job wrote, and nothing else: it can never be finished as asked. files: all that it may have written."""
        for file in files:
            (self.out / file).unlink(missing_ok=True)
        for folder in sorted({self.out / parent for file in files for parent in PurePosixPath(file).parents[:-1]}, reverse=True):
            with suppress(OSError):  # not there, or not empty
                folder.rmdir()
        self.withdraw()

    def withdraw(self) -> None:
        """Takes the working state back, and an output that is empty without it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if not any(self.out.iterdir()) and not self.out.is_symlink():  # a link is the user's
            self.out.rmdir()

    def partial(self, file: str, writer: str = "") -> Path:
        """Where a file is written first. writer: its mark, where several write: one that was given up may still be at it."""
        return self.folder / (flat_name(file) + writer + ".partial")

    def sweep(self) -> None:
        """Removes what writers left unfinished that are no more."""
        for path in self.folder.glob("*.partial"):
            path.unlink(missing_ok=True)

    def _record(self, file: str) -> Path:
        return self.folder / (flat_name(file) + ".json")

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            value = parse_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return value if isinstance(value, dict) else None


def flat_name(file: str) -> str:
    """A name without folders for what is kept of `file`: no two files have the same. Few characters are replaced: names have a longest length."""
    return file.replace("%", "%25").replace("/", "%2F")


def _recorded() -> ModuleType:
    """The checks of what is read back. pydantic takes a tenth of a second to import, and a run that starts afresh reads nothing back."""
    from lox_merge.jobs import recorded

    return recorded


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [text for key in keys for text in _differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))]
    return [] if before == now else [f"{name} was {before}, is now {now}"]
