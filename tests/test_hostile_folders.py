"""Folders, file names and links that others made: looked at when a checkpoint is opened, before anything is read or written."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from fuzz.materials import Materials

from lox_merge import harden
from lox_merge.checkpoint.files import LocalFolder, find_source
from lox_merge.errors import CheckpointFormatError, RequestError, SourceError


@pytest.fixture
def folder(materials: Materials, tmp_path: Path) -> Path:
    return shutil.copytree(materials.aligned, tmp_path / "aligned")


def refused(base: Path, aligned: Path, out: Path) -> str:
    with pytest.raises(RequestError) as caught:
        harden(base, aligned, out)
    assert not out.exists() and str(caught.value).isprintable()
    return str(caught.value)


def nested(folder: Path, depth: int) -> None:
    """Folders in folders, one by one: together their names may be longer than a path can be."""
    before = os.open(".", os.O_RDONLY)
    try:
        os.chdir(folder)
        for _ in range(depth):
            Path("d").mkdir()
            os.chdir("d")
        Path("note.txt").write_text("here")
    finally:
        os.fchdir(before)
        os.close(before)


@pytest.mark.parametrize("depth", [65, 1_200])
def test_folders_in_folders(materials: Materials, folder: Path, tmp_path: Path, depth: int) -> None:
    nested(folder, depth)
    try:
        assert "lies in more than 64 folders" in refused(materials.base, folder, tmp_path / "out")
    finally:
        subprocess.run(["rm", "-r", folder / "d"], check=True)  # shutil.rmtree, which pytest cleans up with, does not come down there


def test_as_many_folders_as_a_model_may_have(folder: Path) -> None:
    nested(folder, 64)
    assert "d/" * 64 + "note.txt" in LocalFolder(folder).names()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_names_that_are_no_text(materials: Materials, folder: Path, tmp_path: Path, kind: str) -> None:
    """The manifest names every file, and is written when all shards are."""
    odd = folder / os.fsdecode(b"notes_\xe9.txt")
    if kind == "file":
        odd.write_text("text")
    elif kind == "folder":
        odd.mkdir()
    else:
        odd.symlink_to("nothing")
    message = refused(materials.base, folder, tmp_path / "out")
    assert f"the name of a {kind.replace('link', 'file')} in aligned/ is not UTF-8: notes_\\xe9.txt" in message


def test_a_folder_whose_own_name_is_no_text(folder: Path) -> None:
    odd = folder.rename(Path(os.fsdecode(os.fsencode(folder) + b"\xe9")))
    with pytest.raises(CheckpointFormatError, match=r"the name of the folder is not UTF-8: aligned\\xe9"):
        find_source(odd, "aligned")
    odd.rename(folder)


def test_what_cannot_be_listed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanished(path: Path, **_: object) -> os.stat_result:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    source = LocalFolder(folder)
    found = source._walk(folder, "")
    monkeypatch.setattr(source, "_walk", lambda *_: found)
    monkeypatch.setattr(Path, "stat", vanished)
    with pytest.raises(SourceError, match=r"chat_template\.jinja cannot be read: No such file"):
        source.names()
