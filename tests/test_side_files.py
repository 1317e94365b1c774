"""Files beside the weights: of any size, copied a piece at a time, whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from fuzz.materials import Materials

from lox_merge import harden
from lox_merge.errors import SourceError, WriteError
from lox_merge.jobs import atomic
from lox_merge.jobs.atomic import copy_atomically, sync_folder

NAME = "__0_0.distcp"


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A side file of several pieces that cannot be read whole, as one of 40 GB could not."""
    read = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == NAME:
            raise MemoryError
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    file = tmp_path / NAME
    file.write_bytes(os.urandom(2 * atomic._CHUNK + 3))
    return file


def test_side_files_are_copied_in_pieces(materials: Materials, large: Path, tmp_path: Path) -> None:
    aligned = shutil.copytree(materials.aligned, tmp_path / "aligned")
    (aligned / "deeper").mkdir()
    shutil.copyfile(large, aligned / "deeper" / NAME)
    out = harden(materials.base, aligned, tmp_path / "out").out
    with large.open("rb") as one, (out / "deeper" / NAME).open("rb") as other:
        content = one.read()
        assert content == other.read()
    assert json.loads((out / "lox_merge.json").read_text())["output"]["files"][f"deeper/{NAME}"] == hashlib.sha256(content).hexdigest()


def test_side_files_of_a_merge_are_too(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pytest.importorskip("lox_merge.mergekit.run")
    partial = tmp_path / "partial"
    partial.mkdir()
    monkeypatch.setattr(run, "_side_files", lambda *_: {"config.json": large, f"deeper/{NAME}": large})
    monkeypatch.setattr(run, "output_config", lambda _: b"{}")
    run._complete(SimpleNamespace(files=None), {}, partial, "merge", SimpleNamespace(copy_tokenizer=True, write_model_card=False))
    assert atomic.sha256_of(partial / "deeper" / NAME) == atomic.sha256_of(large) and (partial / "config.json").read_text() == "{}"


def test_a_copy_is_whole_or_not_there(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(SourceError, match=r"nothing\.bin cannot be read: No such file"):
        copy_atomically(tmp_path / "nothing.bin", tmp_path / "copy", scratch)
    monkeypatch.setattr(atomic.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(WriteError, match="No space left on device"):
        copy_atomically(large, tmp_path / "copy", scratch)
    assert not list(scratch.iterdir()) and not (tmp_path / "copy").exists()
    monkeypatch.undo()
    assert copy_atomically(large, tmp_path / "copy", scratch) == atomic.sha256_of(tmp_path / "copy") == atomic.sha256_of(large)
    assert not list(scratch.iterdir())


def test_folders_of_side_files_survive_a_power_cut(materials: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is on the disk once its folder is synced; the manifest, which says that all is there, comes after."""
    aligned = shutil.copytree(materials.aligned, tmp_path / "aligned")
    for name in ("a.txt", "additional/one.txt", "additional/deeper/two.txt"):
        (aligned / name).parent.mkdir(exist_ok=True)
        (aligned / name).write_text("x")
    synced: list[tuple[str, bool]] = []
    out = tmp_path / "out"

    def noted(folder: Path) -> None:
        sync_folder(folder)
        synced.append((folder.relative_to(out).as_posix(), (out / "lox_merge.json").exists()))

    monkeypatch.setattr("lox_merge.jobs.execute.sync_folder", noted)
    harden(materials.base, aligned, out)
    assert synced == [("additional", False), ("additional/deeper", False), (".", True)]
