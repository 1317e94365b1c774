"""A finished output on disk: its manifest, and the files of it that are published. Whatever else lies in its folder stays there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lox_merge.checkpoint.files import check_file_name
from lox_merge.checkpoint.json_text import parse_json
from lox_merge.errors import OutputError, SourceChangedError
from lox_merge.jobs.manifest import FORMAT
from lox_merge.jobs.output_folder import MANIFEST, WORK_FOLDER
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.recorded import manifest_damage
from lox_merge.jobs.store import WEIGHTS_NOTE
from lox_merge.publish.command import form_of

_MERGEKIT = "mergekit_config.yml"


@dataclass(frozen=True)
class OutputFile:
    """One file as the manifest knows it. stamp: size and time of change when it was opened, to see changes without reading it again."""

    name: str
    path: Path
    sha256: str
    stamp: tuple[int, int] = field(repr=False)

    @property
    def size(self) -> int:
        return self.stamp[0]

    def check_unchanged(self) -> None:
        """Raises SourceChangedError if the file is not what it was when the output was opened."""
        if _stamp(self.path) != self.stamp:
            raise changed(self.name)


@dataclass(frozen=True)
class FinishedOutput:
    """files: those in the folder, in the manifest's order, the manifest itself last. hashes: sha256 by name of all that belongs to it."""

    folder: Path
    manifest: Mapping[str, Any] = field(repr=False)
    manifest_sha256: str
    files: tuple[OutputFile, ...] = field(repr=False)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def hashes(self) -> dict[str, str]:
        return _hashes(self.manifest, self.manifest["output"]["shards"]) | {MANIFEST: self.manifest_sha256}

    @property
    def is_adapter(self) -> bool:
        return form_of(self.manifest) == "adapter"

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the output, {} where it has none."""
        file = next((file for file in self.files if file.name == name), None)
        try:
            value = parse_json(file.path.read_bytes()) if file else {}
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{self.name}/{name} cannot be read as JSON: {error}. Make the output again with lox-merge harden --overwrite."
            ) from error
        return value if isinstance(value, dict) else {}

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration, or the adapter's."""
        return self.json("adapter_config.json" if self.is_adapter else "config.json")

    def has(self, *names: str) -> bool:
        return bool({file.name for file in self.files} & set(names))


def changed(name: str) -> SourceChangedError:
    return SourceChangedError(
        f"{name} changed after it was checked. What was uploaded is not committed, so nothing of it is visible. "
        "Leave the output alone and run the same command again."
    )


def open_output(folder: str | Path, *, weights_on_hub: bool = False) -> FinishedOutput:
    """Raises OutputError unless `folder` is a finished output of this program. Reads no weights: `verify` does.

    weights_on_hub: that of a job whose shards are sent to the Hub and not committed yet; they are not among its files then.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise OutputError(f"there is no folder {folder}. Give the output of lox-merge harden.")
    folder = folder.resolve()
    if (folder / WORK_FOLDER).exists() and not weights_on_hub:
        raise OutputError(
            f"{folder.name} is unfinished: it is being written, or was interrupted ({WORK_FOLDER} is there). "
            "Run the lox-merge harden that makes it again, which goes on, and then publish it."
        )
    if not (folder / MANIFEST).is_file():
        hint = " It is mergekit's: lox-merge yaml keeps no manifest; harden it with lox-merge harden." if (folder / _MERGEKIT).is_file() else ""
        raise OutputError(f"{folder.name} has no {MANIFEST}, so it is no finished output of lox-merge harden.{hint}")
    data = (folder / MANIFEST).read_bytes()
    manifest = _parse(data, folder.name)
    if (folder / WEIGHTS_NOTE).is_file() and not weights_on_hub:
        raise OutputError(
            f"{folder.name} holds no weights: they are on the Hub, where {WEIGHTS_NOTE} says. Publish it with the lox-merge harden that made it."
        )
    entries = _hashes(manifest, [] if weights_on_hub else manifest["output"]["shards"])
    sha256 = hashlib.sha256(data).hexdigest()
    files = []
    for name, digest in (entries | {MANIFEST: sha256}).items():
        check_file_name(name, f"{folder.name}/{MANIFEST}")
        if not (folder / name).is_file():
            raise OutputError(f"{folder.name} lacks {name}, which its manifest names. Make the output again with lox-merge harden --overwrite.")
        files.append(OutputFile(name, folder / name, digest, _stamp(folder / name)))
    return FinishedOutput(folder, manifest, sha256, tuple(files))


def _hashes(manifest: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {entry["file"]: entry["sha256"] for entry in shards} | dict(manifest["output"]["files"])


def _parse(data: bytes, name: str) -> dict[str, Any]:
    try:
        manifest = parse_json(data)
        damage = manifest_damage(manifest) if isinstance(manifest, dict) else "no JSON object"
    except ValueError as error:
        damage = str(error)
    if damage:
        raise OutputError(f"{name}/{MANIFEST} is damaged, or of another version of lox-merge (this one reads format {FORMAT}): {damage}.")
    job = manifest["job"]
    if job["method"] != "lox":
        raise OutputError(f"{name} is an output of lox-merge {job['method']}; only those of lox-merge harden have a model card and are published.")
    missing = sorted(Recipe().to_json().keys() - job["recipe"].keys())
    if missing:
        raise OutputError(f"{name}/{MANIFEST} is damaged: its recipe lacks {', '.join(missing)}.")
    Recipe.from_json(job["recipe"])
    return dict(manifest)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise changed(path.name) from error
    return status.st_size, status.st_mtime_ns
