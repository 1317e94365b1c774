"""Reads the JSON of runs and says of which command each is."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lox_merge.errors import RequestError

MANIFEST = "lox_merge.json"
# Would garble a page, or cannot be written at all: control characters, changes of direction, halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff\ud800-\udfff]")


@dataclass(frozen=True)
class Run:
    """One file. name: its own name without folders; sha256: of its bytes."""

    name: str
    sha256: str
    document: dict[str, Any] = field(repr=False)

    @property
    def command(self) -> str | None:
        """The command that wrote it; 'manifest' or 'project' for that of an output, None where neither can be told."""
        command = self.document.get("command")
        if isinstance(command, str):
            return command
        if not {"format", "job", "tensors", "summary"} <= self.document.keys():
            return None
        job = self.document["job"]
        return "project" if isinstance(job, dict) and job.get("method") == "project" else "manifest"


def read_run(path: Path) -> Run:
    """A JSON file, or a folder with a manifest. Raises RequestError that names the file."""
    file = path / MANIFEST if path.is_dir() else path
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        found = f"the folder {path} holds no {MANIFEST}" if path.is_dir() else f"there is no file {path}"
        raise RequestError(f"{found}. Give what a command wrote with --json, or the folder of a hardened model.") from None
    except OSError as error:
        raise RequestError(f"{file} can't be read: {error.strerror or error}.") from error
    try:
        document = printable(json.loads(data.decode("utf-8-sig")))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise RequestError(f"{file} is not JSON ({error}). Give what a command wrote with --json.") from error
    if not isinstance(document, dict):
        raise RequestError(f"{file} holds no run: its JSON is not an object. Give what a command wrote with --json.")
    return Run(file.name, hashlib.sha256(data).hexdigest(), document)


def printable(value: Any) -> Any:
    """The same value with text that can be shown: JSON may come from anyone."""
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, list):
        return [printable(item) for item in value]
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    return value
