"""A worker's folder among the files that everybody may write beside."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from lox_merge.jobs.executors.workspace import Workspace


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_a_killed_worker_left_goes_and_what_another_uses_stays(temporary: Path) -> None:
    first = Workspace()
    left = first.folder.parent / "worker-left"
    left.mkdir()
    (left / "shard").write_bytes(b"x")
    second = Workspace()
    assert first.folder.is_dir() and second.folder.is_dir() and not left.exists()
    assert first.folder.parent == second.folder.parent == temporary / f"lox-merge-{os.getuid()}"
    for workspace in (first, second):
        workspace.remove()
    assert not list(first.folder.parent.glob("worker-*"))


@pytest.mark.parametrize("made", ["link", "open"])
def test_a_folder_that_somebody_else_made_is_not_used(temporary: Path, made: str) -> None:
    theirs = temporary / "theirs"
    theirs.mkdir()
    root = temporary / f"lox-merge-{os.getuid()}"
    if made == "link":
        root.symlink_to(theirs)
    else:
        root.mkdir()
        root.chmod(0o777)
    workspace = Workspace()
    assert workspace.folder.is_dir() and root not in workspace.folder.parents
    assert not list(theirs.iterdir()) and not list(root.iterdir())
    workspace.remove()
