"""Hashes begun before there is a plan: taken where the file is still the one that was read, and only then."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest

from lox_merge.jobs import early, hashing
from lox_merge.jobs.early import _Early, begin_early, begun_early
from lox_merge.jobs.hashing import SourceHasher, hashing_threads
from lox_merge.jobs.stamps import stamp_of


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.safetensors" for name in ("a", "b", "c")]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 1000)
    return paths


def test_a_hash_is_of_the_file_as_its_stamp_says(files: list[Path]) -> None:
    early_hashes = _Early()
    early_hashes.hash_all(files)
    future = early_hashes.take(files[0], stamp_of(files[0]))
    assert future is not None and future.result() == digest(files[0])
    stamp = stamp_of(files[1])
    files[1].write_bytes(b"other")
    assert early_hashes.take(files[1], stamp_of(files[1])) is None, "it changed since"
    assert early_hashes.take(files[0], stamp_of(files[0])) is None, "a hash is handed over once"
    other = files[2].with_name("new.safetensors")
    other.write_bytes(files[2].read_bytes())
    assert early_hashes.take(other, stamp) is None, "nobody read it"


def test_a_file_with_size_and_time_put_back_is_another_one(files: list[Path]) -> None:
    early_hashes = _Early()
    early_hashes.hash_all(files)
    before = files[0].stat()
    files[0].write_bytes(b"x" * 1000)
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert early_hashes.take(files[0], stamp_of(files[0])) is None


def test_nothing_is_begun_once_the_plan_has_asked(files: list[Path]) -> None:
    early_hashes = _Early()
    assert early_hashes.take(files[0], stamp_of(files[0])) is None
    early_hashes.hash_all(files)
    assert early_hashes.take(files[1], stamp_of(files[1])) is None


def test_a_file_that_is_gone_ends_it_quietly(files: list[Path]) -> None:
    early_hashes = _Early()
    files[1].unlink()
    early_hashes.hash_all(files)
    assert early_hashes.take(files[2], stamp_of(files[2])) is None


def test_the_hasher_takes_over_what_was_begun(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "_EARLY", _Early())
    begin_early([tmp_path, "org/name", tmp_path / "nothing here"])
    deadline = time.monotonic() + 60
    while any(thread.name == "hash early" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    begun = early._EARLY._begun
    assert {path.name: future.result() for path, (_, future) in begun.items()} == {path.name: digest(path) for path in files}
    marked: Future[str] = Future()
    marked.set_result("read before")
    begun[files[0]] = stamp_of(files[0]), marked
    hasher = SourceHasher([[("base", path.name) for path in files[:2]]], lambda file: tmp_path / file[1])
    assert hasher.hashes(0) == {("base", files[0].name): "read before", ("base", files[1].name): digest(files[1])}
    hasher.close()
    assert begun_early(files[1], stamp_of(files[1])) is None, "it was taken"


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, SystemExit])
def test_whatever_ends_it_ends_the_wait_too(files: list[Path], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    def fail(path: Path) -> str:
        raise error

    monkeypatch.setattr(early, "sha256_of", fail)
    early_hashes = _Early()
    early_hashes.hash_all(files)
    future = early_hashes.take(files[0], stamp_of(files[0]))
    assert future is not None
    with pytest.raises(error):
        future.result(timeout=0)


def begun_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """Which files are hashed early, found without a thread."""
    monkeypatch.setattr(early, "_EARLY", _Early())
    monkeypatch.setattr(early.threading, "Thread", lambda target, args, **_: SimpleNamespace(start=lambda: target(*args)))
    begin_early([folder])
    return set(early._EARLY._begun)


def test_links_that_leave_the_folder_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan has refused them yet."""
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "a.safetensors").write_text("weights")
    assert begun_in(folder, monkeypatch) == {folder / "a.safetensors"}
    for other in (tmp_path / "secret.txt", Path("/dev/zero"), folder / "evil.safetensors", tmp_path / "nothing"):
        (folder / "evil.safetensors").symlink_to(other)
        assert begun_in(folder, monkeypatch) == set()
        (folder / "evil.safetensors").unlink()
    os.mkfifo(folder / "b.safetensors")
    assert begun_in(folder, monkeypatch) == {folder / "a.safetensors"}


def test_links_of_the_hub_cache_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob, snapshot = tmp_path / "blobs" / "0", tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    blob.write_text("weights")
    for name in ("a", "b"):
        (snapshot / f"{name}.safetensors").symlink_to(blob)
    assert begun_in(snapshot, monkeypatch) == {blob}
    future = begun_early(snapshot / "a.safetensors", stamp_of(snapshot / "a.safetensors"))
    assert future is not None and future.result(timeout=0) == digest(blob)


def test_many_cores_hash_several_files_at_a_time(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be read on holds up no other one."""
    assert [hashing_threads(cores) for cores in (1, 2, 7, 8, 15, 16, 128)] == [1, 1, 1, 2, 3, 4, 4]
    monkeypatch.setattr(hashing, "available_cores", lambda: 8)
    stuck = tmp_path / "stuck.safetensors"
    os.mkfifo(stuck)
    hasher = SourceHasher([[("base", stuck.name), ("base", files[0].name)]], lambda file: tmp_path / file[1])
    hasher.start_shard(0)
    deadline = time.monotonic() + 60
    while ("base", files[0].name) not in hasher.known() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {file: value for file, (value, _) in hasher.known().items()} == {("base", files[0].name): digest(files[0])}
    os.close(os.open(stuck, os.O_WRONLY))
    hasher.close()
