"""The folder of an output, before anything is written into it: whether it may be taken, and whether its disk has room."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from lox_merge.checkpoint.adapter_files import OverBase
from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.checkpoint.files import LocalFolder
from lox_merge.errors import OutputError
from lox_merge.home_paths import expanded

WORK_FOLDER = ".lox_merge"
MANIFEST = "lox_merge.json"
# Room for index, manifest and file system overhead beside what is counted exactly.
_DISK_MARGIN = 16 * 2**20


def output_folder(out: str | Path) -> Path:
    """The output as it was given. Raises OutputError for an empty text, which would be the current folder."""
    if not str(out).strip():
        raise OutputError("the output is empty. Name a folder for it.")
    return expanded(out)


def check_room(out: Path, count: int) -> None:
    """Raises OutputError when the file system of `out` lacks room for `count` bytes and a little more."""
    needed = count + _DISK_MARGIN
    free = shutil.disk_usage(_existing_parent(out)).free
    if free < needed:
        raise OutputError(
            f"the disk of {out} has {free / 1e9:,.2f} GB free and {needed / 1e9:,.2f} GB are needed. Free some room or choose another disk."
        )


def _existing_parent(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def output_problems(out: Path, checkpoints: Iterable[Checkpoint]) -> list[str]:
    problems = []
    target = out.resolve()
    for checkpoint in checkpoints:
        source = checkpoint.source.adapter if isinstance(checkpoint.source, OverBase) else checkpoint.source
        if isinstance(source, LocalFolder):
            root = source.root
            if target == root or target.is_relative_to(root):
                problems.append(f"the output {out} lies inside {checkpoint.role} ({checkpoint.title}); choose a folder outside it.")
            elif root.is_relative_to(target):
                problems.append(f"{checkpoint.role} ({checkpoint.title}) lies inside the output {out}; choose another output folder.")
    parent = _existing_parent(out)
    if not parent.is_dir():
        problems.append(f"the output {out} can't be made: {parent} is a file, not a folder. Choose another output folder.")
    elif not os.access(parent, os.W_OK | os.X_OK):
        problems.append(f"the output {out} can't be made: no permission to write in {parent}. Choose another folder or change its permissions.")
    return problems


def check_output(out: Path, *, overwrite: bool) -> None:
    """Raises OutputError when `out` holds anything that is not an output of this program."""
    check_work_folder(out / WORK_FOLDER)
    if out.is_symlink() and not out.exists():
        raise OutputError(f"the output {out} is a link to a folder that is not there. Make that folder, or remove the link.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise OutputError(f"the output {out} is a file. Choose another name.")
    if not (out / MANIFEST).is_file() and not (out / WORK_FOLDER).is_dir():
        hint = "--overwrite replaces only folders that lox-merge wrote. " if overwrite else ""
        raise OutputError(f"the output {out} exists and was not written by lox-merge. {hint}Choose another folder, or empty it yourself.")


def check_work_folder(folder: Path) -> None:
    """Raises OutputError for a link: starting anew would empty the folder that it points to."""
    if folder.is_symlink():
        raise OutputError(f"{folder} is a link, and working files have to be in the folder itself. Remove the link, or choose another output.")
