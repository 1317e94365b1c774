"""Where a checkpoint's files are: a local folder, or a Hub repository at one commit.

Both answer the same questions: which files, how long, what is in a safetensors header, and where is the file on disk.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from lox_merge.checkpoint.safetensors_format import Header, parse_header, read_header
from lox_merge.checkpoint.stamps import Stamp, stamp_of
from lox_merge.errors import CheckpointFormatError, SourceError
from lox_merge.home_paths import expanded

if TYPE_CHECKING:
    from lox_merge.checkpoint import hub

# Folders inside a checkpoint that are not part of the model.
_SKIPPED_FOLDERS = {".git", ".cache", ".lox_merge", "__pycache__", "runs", "original", "onnx", "openvino", "coreml"}
# Folders inside folders: models have two or three. A thousand are more than Python and many programs can go down.
_DEEPEST = 64


def check_file_name(name: str, where: str) -> None:
    """Raises CheckpointFormatError for a name that could leave the checkpoint's folder."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or (len(name) > 1 and name[1] == ":"):
        raise CheckpointFormatError(f"{where} names the file {name!r}, which is outside the checkpoint's folder. Fix the index, or do not use it.")


def _check_text(name: str, what: str) -> None:
    """Raises CheckpointFormatError for a name that is no UTF-8: neither the manifest nor a message could hold it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = ascii(os.fsencode(name))[2:-1]
        raise CheckpointFormatError(
            f"the name of {what} is not UTF-8: {shown}. Rename it, or move it elsewhere if the model works without."
        ) from None


class FileSource(Protocol):
    """The files of one checkpoint."""

    @property
    def title(self) -> str:
        """How messages and the manifest call it: a Hub id with revision, or a folder's own name."""
        ...

    def names(self) -> dict[str, int]:
        """File name (posix, relative) to size in bytes."""
        ...

    def path(self, name: str) -> Path:
        """The file on disk (fetched if need be)."""
        ...

    def header(self, name: str) -> Header:
        """The safetensors header, without fetching the whole file."""
        ...

    def seen(self, name: str) -> Stamp | None:
        """What a weight file looked like just before its header was read, where it was on this machine then; None elsewhere."""
        ...

    def look_at(self, name: str) -> None:
        """A weight file is about to be read for the first time: `seen` is from now."""
        ...

    def fetch(self, names: Sequence[str]) -> None:
        """Make these files available on disk."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the manifest records about the source. Holds no path of this machine."""
        ...


class LocalFolder:
    """A folder on this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        _check_text(self.root.name, "the folder")
        self._names: dict[str, int] | None = None
        self._seen: dict[str, Stamp] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For another process, maybe on another machine, where one file on shared storage may have another number."""
        return self.__dict__ | {"_seen": {}}

    @property
    def title(self) -> str:
        return self.root.name

    def names(self) -> dict[str, int]:
        if self._names is None:
            try:
                self._names = {name: self.path(name).stat().st_size for name in sorted(self._walk(self.root, ""))}
            except OSError as error:
                raise SourceError(f"{error.filename or self.root} cannot be read: {error.strerror or error}.") from error
        return self._names

    def _walk(self, folder: Path, prefix: str) -> list[str]:
        found: list[str] = []
        if prefix.count("/") > _DEEPEST:
            raise CheckpointFormatError(
                f"{self.title}/{prefix[:100]}… lies in more than {_DEEPEST} folders, which no model has. Move what does not belong to it elsewhere."
            )
        for entry in sorted(folder.iterdir()):
            if entry.is_dir():
                # A linked folder is somebody else's tree; a checkpoint in the middle of training is not the model.
                if entry.name not in _SKIPPED_FOLDERS and not entry.name.startswith("checkpoint-") and not entry.is_symlink():
                    _check_text(entry.name, f"a folder in {self.title}/{prefix}")
                    found += self._walk(entry, f"{prefix}{entry.name}/")
            elif entry.is_file() or entry.is_symlink():
                _check_text(entry.name, f"a file in {self.title}/{prefix}")
                if not entry.is_file():
                    raise CheckpointFormatError(
                        f"{self.title}/{prefix}{entry.name} is a link to a file that is not there. Restore the file or remove the link."
                    )
                found.append(prefix + entry.name)
        return found

    def path(self, name: str) -> Path:
        check_file_name(name, self.title)
        path = self.root / name
        if path.name == name and not path.is_symlink():
            return path  # the root has no links in it; a thousand files are looked up several times
        target = path.resolve()
        if not target.is_relative_to(self.root) and not target.is_relative_to(self._hub_blobs()):
            raise CheckpointFormatError(
                f"{self.title}/{name} is a link to a file outside the checkpoint's folder. Copy the file into the folder, and try again."
            )
        return path

    def _hub_blobs(self) -> Path:
        """The Hub cache keeps snapshots/<commit>/file -> ../../blobs/<hash>: those links belong to the checkpoint."""
        return self.root.parent.parent / "blobs" if self.root.parent.name == "snapshots" else self.root

    def header(self, name: str) -> Header:
        self.look_at(name)
        return read_header(self.path(name), f"{self.title}/{name}")

    def seen(self, name: str) -> Stamp | None:
        return self._seen.get(name)

    def look_at(self, name: str) -> None:
        with suppress(OSError):  # whoever reads it says what is wrong with it
            self._seen[name] = stamp_of(self.path(name))

    def fetch(self, names: Sequence[str]) -> None:
        pass

    def identity(self) -> dict[str, Any]:
        return {"kind": "folder", "name": self.root.name}


@dataclass
class HubFiles:
    """A Hub repository at one commit; files are fetched when they are needed."""

    snapshot: hub.HubSnapshot
    cache_dir: Path | None = None
    _folder: Path | None = field(default=None, repr=False)
    _fetched: set[str] = field(default_factory=set, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """For another process, maybe on another machine with a cache of its own."""
        return self.__dict__ | {"_folder": None, "_fetched": set()}

    @property
    def title(self) -> str:
        return f"{self.snapshot.repo_id}@{self.snapshot.revision}" if self.snapshot.revision else self.snapshot.repo_id

    def names(self) -> dict[str, int]:
        return {
            name: file.size
            for name, file in self.snapshot.files.items()
            if not any(part in _SKIPPED_FOLDERS for part in PurePosixPath(name).parts[:-1])
        }

    def path(self, name: str) -> Path:
        check_file_name(name, self.title)
        if self._folder is None or name not in self._fetched:
            self.fetch([name])
        assert self._folder is not None
        return self._folder / name

    def header(self, name: str) -> Header:
        from lox_merge.checkpoint import hub

        return parse_header(hub.read_safetensors_header(self.snapshot, name, self.cache_dir), self.snapshot.files[name].size, f"{self.title}/{name}")

    def seen(self, name: str) -> Stamp | None:
        return None  # its commit fixes every byte, and most files come later

    def look_at(self, name: str) -> None:
        pass

    def fetch(self, names: Sequence[str]) -> None:
        from lox_merge.checkpoint import hub

        missing = [name for name in names if name not in self._fetched]
        if missing or self._folder is None:
            self._folder = hub.download(self.snapshot, missing, self.cache_dir)
            self._fetched.update(missing)

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "hub",
            "name": self.snapshot.repo_id,
            "revision": self.snapshot.revision,
            "commit": self.snapshot.commit,
        }


def find_source(text: str | Path, role: str, cache_dir: Path | None = None) -> FileSource:
    """A local folder if there is one of that name, else the Hub repository `org/name[@revision]`.

    role ('base', 'aligned') names the argument in messages. Raises SourceError.
    """
    if not str(text).strip():  # would be the current folder
        raise SourceError(f"{role} is empty. Give a local folder or a Hub id such as org/name or org/name@revision.")
    path = expanded(text)
    if path.is_dir():
        return LocalFolder(path)
    if path.is_file():
        raise SourceError(f"{role}: {path} is a file; give the folder that holds the checkpoint (config.json and its weights).")
    from lox_merge.checkpoint import hub  # only here: local folders need no Hub client

    reference = hub.parse_hub_reference(text) if isinstance(text, str) else None
    if reference is None:
        raise SourceError(f"{role}: there is no folder {path}. Give a local folder or a Hub id such as org/name or org/name@revision.")
    try:
        return HubFiles(hub.resolve(reference, cache_dir), cache_dir)
    except SourceError as error:
        raise SourceError(f"{role}: {error} (There is no local folder {text} either.)") from error
