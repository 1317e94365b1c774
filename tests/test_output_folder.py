"""Whose files an output folder holds: links in it, and other processes at work in it."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest
import torch
from conftest import RunCli
from safetensors.torch import load_file, save_file
from tiny_models import make_pair

from lox_merge import Recipe, harden
from lox_merge.errors import LoxMergeWarning, NonFiniteDeltaError, OutputError, RequestError
from lox_merge.jobs.adapter import execute_adapter
from lox_merge.jobs.adapter_plan import plan_adapter
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.pieces import piece_name
from lox_merge.safety.line_store import LineStore

Pair = tuple[Path, Path]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path, "llama", aligned_shards=2)


def linked_to(folder: Path, link: Path) -> Path:
    """Somebody's files behind a link."""
    (folder / "data").mkdir(parents=True)
    (folder / "thesis.tex").write_text("x")
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(folder)
    return folder


@pytest.mark.parametrize("overwrite", [False, True])
def test_working_files_behind_a_link(pair: Pair, tmp_path: Path, run_cli: RunCli, overwrite: bool) -> None:
    theirs = linked_to(tmp_path / "theirs", tmp_path / "out" / ".lox_merge")
    done = run_cli("harden", *pair, tmp_path / "out", "--rank", 4, *(["--overwrite"] if overwrite else []))
    assert done.returncode == 2 and "is a link" in " ".join(done.stderr.split()), done.stderr
    assert sorted(path.name for path in theirs.iterdir()) == ["data", "thesis.tex"]


def test_pieces_of_factors_behind_a_link(pair: Pair, tmp_path: Path) -> None:
    theirs = linked_to(tmp_path / "theirs", tmp_path / ".factors.safetensors.parts")
    with pytest.raises(OutputError, match=r"\.parts is a link"):
        decompose(*pair, tmp_path / "factors.safetensors", recipe=Recipe(rank=4), overwrite=True)
    assert sorted(path.name for path in theirs.iterdir()) == ["data", "thesis.tex"]


def test_an_output_that_is_a_link_is_filled_and_emptied_but_stays(pair: Pair, tmp_path: Path) -> None:
    base, aligned = pair
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    file = sorted(aligned.glob("*.safetensors"))[-1]
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    spoilt = next(name for name in tensors if tensors[name].ndim == 2)
    good = tensors[spoilt].clone()
    tensors[spoilt][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NonFiniteDeltaError):
        harden(base, aligned, tmp_path / "out", recipe=Recipe(rank=4))
    assert (tmp_path / "out").is_symlink() and not list((tmp_path / "disk").iterdir())
    save_file(tensors | {spoilt: good}, file, metadata={"format": "pt"})
    harden(base, aligned, tmp_path / "out", recipe=Recipe(rank=4))
    assert (tmp_path / "disk" / "lox_merge.json").is_file()


def test_what_another_process_works_with_is_left_to_it(pair: Pair, tmp_path: Path) -> None:
    """The old result stays until a run with overwrite=True ends; the same call without it finds that result."""
    decompose(*pair, tmp_path / "f.safetensors", recipe=Recipe(rank=4))
    harden(*pair, tmp_path / "out", recipe=Recipe(rank=4))
    for folder, call in (
        (tmp_path / ".f.safetensors.parts", lambda: decompose(*pair, tmp_path / "f.safetensors", recipe=Recipe(rank=4))),
        (tmp_path / "out", lambda: harden(*pair, tmp_path / "out", recipe=Recipe(rank=4))),
    ):
        with Journal(folder).locked():
            with pytest.raises(OutputError, match="another process is writing"):
                call()
            assert (folder / ".lox_merge" / "lock").exists()
        call()  # nobody is at work there: what was left goes
        assert not (folder / ".lox_merge").exists()


def test_an_adapter_stopped_before_its_pieces_went(pair: Pair, tmp_path: Path) -> None:
    """The manifest comes first: what a run of hours found is not thrown away before the result is whole."""
    plan = plan_hardening(*pair, tmp_path / "out", recipe=Recipe(rank=4))
    execute_adapter(plan_adapter(plan))
    there = sorted(path.name for path in plan.out.iterdir())
    for shard in plan.shards:
        (plan.out / piece_name(shard)).write_bytes(b"vectors")
    (plan.out / ".lox_merge").mkdir()
    result = execute_adapter(plan_adapter(plan_hardening(*pair, tmp_path / "out", recipe=Recipe(rank=4))))
    assert not result.bytes_written and sorted(path.name for path in plan.out.iterdir()) == there


def test_a_job_that_is_taken_back_leaves_the_files_of_others(pair: Pair, tmp_path: Path) -> None:
    file = sorted(pair[1].glob("*.safetensors"))[-1]
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    next(tensor for tensor in tensors.values() if tensor.ndim == 2)[0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    out = tmp_path / "out"
    (out / ".lox_merge").mkdir(parents=True)  # as an interruption leaves it
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("x")
    for call in (lambda: harden(*pair, out, recipe=Recipe(rank=4)), lambda: execute_adapter(plan_adapter(plan_hardening(*pair, out)))):
        with pytest.raises(NonFiniteDeltaError):
            call()
        assert [path.name for path in out.rglob("*")] == ["notes", "mine.txt"]
        (out / ".lox_merge").mkdir()


@pytest.mark.parametrize("holder", ["output", "replies"])
def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: str) -> None:
    """As Lustre is unless it is mounted with -o flock."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(LoxMergeWarning, match="has no locks"):
        if holder == "output":
            with (
                Journal(tmp_path / "out").locked(),
                pytest.raises(OutputError, match="another process is writing"),
                Journal(tmp_path / "out").locked(),
            ):
                pass
        else:
            with LineStore(tmp_path / "r.jsonl", "replies", {"model": "m"}, "reply"), pytest.raises(RequestError, match="another process"):
                LineStore(tmp_path / "r.jsonl", "replies", {"model": "m"}, "reply")
