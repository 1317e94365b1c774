"""Shards written by workers of a Ray that is started on this machine: the bytes of one process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_pair

from lox_merge import harden
from lox_merge.errors import LoxMergeWarning, NonFiniteDeltaError, RequestError
from lox_merge.jobs.atomic import json_bytes
from lox_merge.jobs.executors.choose import check_executor
from lox_merge.jobs.executors.ray_workers import cores_each, places_of
from lox_merge.jobs.executors.remote import RemoteWorker
from lox_merge.jobs.executors.writer import WorkerTask
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.manifest import job_description
from lox_merge.jobs.work import CrewSize

Pair = tuple[Path, Path]


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def connection() -> Iterator[None]:
    """One Ray for all tests, which a job that finds it leaves alone."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    before = signal.getsignal(signal.SIGTERM)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    assert ray.is_initialized()
    ray.shutdown()
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), "llama", base_shards=2, aligned_shards=4, hidden=256, layers=8, vocabulary=2000)


@pytest.fixture(scope="module")
def expected(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return hashes(harden(*pair, tmp_path_factory.mktemp("expected") / "out").out)


class Watch:
    """Progress that kills the workers when the first bytes are written: whoever wrote them has a shard in hand, the others perhaps not."""

    def __init__(self, kill: bool = False) -> None:
        self.total, self._kill = 0, kill

    def advance(self, count: int) -> None:
        self.total += count
        if self._kill:
            self._kill = False
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # those of the test before may just be going
                    if "RemoteWorker" in " ".join(process.cmdline()):
                        process.kill()


def test_bytes_and_manifest_are_those_of_one_process(pair: Pair, expected: dict[str, str], tmp_path: Path) -> None:
    watch = Watch()
    result = harden(*pair, tmp_path / "out", executor="ray", workers=2, progress=watch)
    assert result.workers == 2
    assert hashes(result.out) == expected
    assert watch.total == result.bytes_written


def test_a_killed_worker_s_shard_is_done_again(pair: Pair, expected: dict[str, str], tmp_path: Path) -> None:
    with pytest.warns(LoxMergeWarning, match="a worker was lost by the end of its process or machine while it wrote model-"):
        result = harden(*pair, tmp_path / "out", executor="ray", workers=2, progress=Watch(kill=True))
    assert hashes(result.out) == expected


def test_errors_are_the_serial_ones(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", aligned_shards=2)
    file = sorted(aligned.glob("*.safetensors"))[1]
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name][0, :3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NonFiniteDeltaError) as caught:
        harden(base, aligned, tmp_path / "out", executor="ray", workers="auto")
    assert caught.value.counts == {name: 3}
    assert not (tmp_path / "out").exists()


def test_a_machine_without_the_output_or_with_other_versions_is_refused(pair: Pair, tmp_path: Path) -> None:
    plan = plan_hardening(*pair, tmp_path / "out")
    task = WorkerTask(plan, torch.device("cpu"), CrewSize(1, 1), None)
    ((kind, error),) = RemoteWorker(task).news()
    assert kind == "failed" and isinstance(error, RequestError) and "does not see the output" in str(error)
    journal = Journal(plan.out)
    journal.folder.mkdir(parents=True)
    job: dict[str, Any] = job_description(plan, task.device)
    (journal.folder / "job.json").write_bytes(json_bytes(job | {"tool": job["tool"] | {"torch": "2.0"}}))
    ((kind, error),) = RemoteWorker(task).news()
    assert kind == "failed" and "with torch 2.0" in str(error) and "same versions" in str(error)


def test_cores_are_divided_so_that_every_worker_finds_a_place() -> None:
    assert [cores_each([8, 4], workers) for workers in (1, 2, 3, 4, 12, 13)] == [8, 4, 4, 2, 1, 0]
    assert cores_each([64, 8], 2, [0, 2]) == 4, "what the other machine has in cores it lacks in GPUs or memory"


def test_memory_and_gpus_bound_the_workers_of_a_machine() -> None:
    assert [places_of({"memory": 10e9, "GPU": 2}, each, cuda) for each, cuda in ((10**9, False), (10**9, True), (6 * 10**9, True))] == [10, 2, 1]
    assert places_of({"memory": 10e9}, 10**9, True) == 0


def test_what_is_refused(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="executor 'slurm' is not known"):
        harden(*pair, tmp_path / "out", executor="slurm")
    with pytest.raises(RequestError, match="use --device cuda"):
        harden(*pair, tmp_path / "out", executor="ray", device="cuda:1")
    with pytest.raises(RequestError, match="the Ray cluster has no GPU"):
        harden(*pair, tmp_path / "none", executor="ray", device="cuda")
    with pytest.raises(RequestError, match="--low-disk"):
        check_executor("ray", low_disk=True)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RequestError, match=r"pip install 'lox-merge\[ray\]'"):
        harden(*pair, tmp_path / "out", executor="ray", workers=2)
    assert not list(tmp_path.rglob("*.safetensors"))
