"""Files written past the page cache hold what was written, whatever its pieces; and are written so where that is possible."""

from __future__ import annotations

import errno
import itertools
import os
import random
import tempfile
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lox_merge.jobs.direct_file import BLOCK, BUFFER_BYTES, LOCAL_FILE_SYSTEMS, DirectFile, file_system

# Places where a piece may begin or end: anywhere in a block, at its edges, and at those of the buffer.
_CUTS = st.one_of(
    st.integers(1, 5 * BLOCK), st.integers(0, 6).map(lambda block: block * BLOCK), st.integers(-1, 1).map(lambda step: BUFFER_BYTES + step * BLOCK)
)
_FILLING = random.Random(0).randbytes(BUFFER_BYTES + 7 * BLOCK)


def _flags(descriptor_of: Path) -> int:
    """Flags of this process's open file, octal in /proc."""
    for entry in Path("/proc/self/fd").iterdir():
        if entry.is_symlink() and entry.readlink() == descriptor_of.resolve():
            return int(Path("/proc/self/fdinfo", entry.name).read_text().split("flags:")[1].split()[0], 8)
    raise AssertionError(f"{descriptor_of} is not open")


def _takes_direct_writes(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return file_system(folder) in LOCAL_FILE_SYSTEMS


def _check_filled(path: Path) -> None:
    with DirectFile(path) as file:
        file.write(_FILLING, 0)
        file.flush()
    assert path.read_bytes() == _FILLING


@settings(max_examples=60, deadline=None)
@given(size=_CUTS, cuts=st.sets(_CUTS, max_size=8), order=st.randoms(use_true_random=False), direct=st.booleans())
def test_pieces_in_any_order_make_the_file(size: int, cuts: set[int], order: random.Random, direct: bool) -> None:
    edges = [0, *sorted(cut for cut in cuts if 0 < cut < size), size]
    pieces = list(itertools.pairwise(edges))
    order.shuffle(pieces)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        with DirectFile(path, direct=direct) as file:
            for begin, end in pieces:
                piece = bytearray(_FILLING[begin:end])
                file.write(memoryview(piece), begin)
                piece[:] = bytes(len(piece))  # it is the caller's again
            file.flush()
            file.sync()
        assert path.read_bytes() == _FILLING[:size]


def test_a_long_run_of_small_pieces(tmp_path: Path) -> None:
    """More than the buffer, as the small tensors of a large shard."""
    data, step = random.Random(1).randbytes(2 * BUFFER_BYTES + 12_345), 30_011
    with DirectFile(tmp_path / "file") as file:
        for begin in range(0, len(data), step):
            file.write(data[begin : begin + step], begin)
        file.flush()
    assert (tmp_path / "file").read_bytes() == data


def test_an_old_file_is_emptied_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3 * BLOCK))
    with DirectFile(tmp_path / "file") as file:
        file.write(b"", 0)
        file.write(b"new", 0)
        file.flush()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_whole_blocks_go_past_the_page_cache_on_a_local_disk(tmp_path: Path) -> None:
    with DirectFile(tmp_path / "file") as file:
        file.write(bytes(3 * BLOCK), 0)
        assert bool(_flags(tmp_path / "file") & os.O_DIRECT) == _takes_direct_writes(tmp_path)
        file.flush()
    with DirectFile(tmp_path / "file", direct=False):
        assert not _flags(tmp_path / "file") & os.O_DIRECT


def test_memory_is_not_written_directly() -> None:
    """Newer kernels would take it, through the same pages."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "file"
        assert file_system(path) == "tmpfs"
        with DirectFile(path) as file:
            assert not _flags(path) & os.O_DIRECT
            file.write(_FILLING, 0)
            file.flush()
        assert path.read_bytes() == _FILLING


def test_a_system_that_does_not_say_what_is_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def partitions(all: bool) -> list[object]:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/proc/filesystems")

    monkeypatch.setattr(psutil, "disk_partitions", partitions)
    assert file_system(tmp_path) == ""
    _check_filled(tmp_path / "file")


def test_a_file_system_that_takes_no_direct_write_after_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, place: int) -> int:
        if _flags(tmp_path / "file") & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data, place)

    monkeypatch.setattr(os, "pwrite", pwrite)
    _check_filled(tmp_path / "file")


def test_a_write_that_the_disk_takes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, place: real(descriptor, data[: 2 * BLOCK], place))
    _check_filled(tmp_path / "file")


def test_other_errors_are_raised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "missing" / "file")
    file = DirectFile(tmp_path / "file")
    file.close()
    file.write(b"x", 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.flush()


def test_an_error_that_the_page_cache_gives_too_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def pwrite(descriptor: int, data: memoryview, place: int) -> int:
        calls.append(place)
        assert len(calls) <= 2, "asked again for ever"
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with DirectFile(tmp_path / "file") as file:
        file.write(bytes(BLOCK), 0)
        with pytest.raises(OSError, match="Invalid argument"):
            file.flush()
