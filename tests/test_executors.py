"""Shards written by several processes: the bytes of one process, whatever the order and whoever is lost on the way."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import time
import warnings
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil
import pytest
import torch
from adapters import make_adapter
from conftest import RunCli
from finetuned import finetune
from forked_cli import CLI
from hub_clients import LoopbackHub, run_client
from safetensors.torch import load_file, save_file
from tiny_models import INDEX, make_pair

from lox_merge import FilterRecipe, Recipe, harden, project
from lox_merge.errors import LoxMergeError, LoxMergeWarning, NonFiniteDeltaError, NumericalError, OutputError, PlanError, RequestError
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.engine import source_path
from lox_merge.jobs.executors.collect import Collected
from lox_merge.jobs.executors.protocol import ShardJob
from lox_merge.jobs.executors.sizing import check_workers, devices_of, in_turn, longest_first, parse_workers, settle_workers, shard_cost
from lox_merge.jobs.executors.sources import SourceLedger
from lox_merge.jobs.executors.worker import _portable, serve
from lox_merge.jobs.executors.writer import WorkerTask
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.hashing import SourceHasher
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.work import CrewSize
from lox_merge.maths.spectral import truncated_svd

Pair = tuple[Path, Path]


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Shards of very different sizes: one holds half of the model."""
    base, aligned = make_pair(tmp_path_factory.mktemp("pair"), "llama", base_shards=2, aligned_shards=12, hidden=256, layers=8, vocabulary=2000)
    index = json.loads((aligned / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    together = {name: tensor for file in files[:6] for name, tensor in load_file(aligned / file).items()}
    for file in files[1:6]:
        (aligned / file).unlink()
    save_file(together, aligned / files[0], metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(together, files[0])
    (aligned / INDEX).write_text(json.dumps(index))
    return base, aligned


@pytest.fixture(scope="module")
def expected(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "out"
    harden(*pair, out)
    return hashes(out)


class Watch:
    """Progress that does something once, when the first bytes are written."""

    def __init__(self, act: Any = None) -> None:
        self.total, self._act = 0, act

    def advance(self, count: int) -> None:
        self.total += count
        if self._act is not None:
            act, self._act = self._act, None
            act()


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """Worker processes: forked by the server that this process started."""
    return [worker for server in process.children() for worker in server.children() if "forkserver" in " ".join(server.cmdline())]


class Held:
    """A worker that is not there."""

    task, held = None, ()

    def send(self, order: object) -> None:
        raise AssertionError


@pytest.mark.parametrize("workers", [2, 3, 20])
def test_bytes_and_manifest_are_those_of_one_process(pair: Pair, expected: dict[str, str], tmp_path: Path, workers: int) -> None:
    watch = Watch()
    result = harden(*pair, tmp_path / "out", workers=workers, progress=watch)
    assert result.workers == min(workers, 7) == result.to_json()["workers"]
    assert hashes(result.out) == expected
    assert watch.total == result.bytes_written


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "qwen3"])
def test_experts_and_tied_embeddings(tmp_path: Path, architecture: str) -> None:
    pair = make_pair(tmp_path, architecture, base_shards=2, aligned_shards=3)
    recipe = Recipe(rank="noise-floor", rounding="stochastic", seed=3)
    one, two = (harden(*pair, tmp_path / f"out{workers}", recipe=recipe, workers=workers) for workers in (1, 2))
    assert (one.workers, two.workers) == (1, 2)
    assert hashes(one.out) == hashes(two.out)


def test_adapters_factors_and_pickled_weights_reach_the_workers(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", base_shards=2, aligned_shards=2)
    adapter = make_adapter(base, tmp_path / "adapter")
    outs = [harden(base, adapter, tmp_path / f"adapter{workers}", workers=workers).out for workers in (1, 2)]
    assert hashes(outs[0]) == hashes(outs[1])
    factors = tmp_path / "factors.safetensors"
    decompose(base, aligned, factors, recipe=Recipe(rank=8))
    outs = [harden(base, aligned, tmp_path / f"factors{workers}", factors=factors, workers=workers).out for workers in (1, 2)]
    assert hashes(outs[0]) == hashes(outs[1])
    tensors = {name: tensor for file in sorted(base.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    for file in (*base.glob("*.safetensors"), base / INDEX):
        file.unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    with pytest.warns(LoxMergeWarning, match="torch.load") as seen:
        outs = [harden(base, aligned, tmp_path / f"pickled{workers}", workers=workers).out for workers in (1, 2)]
    assert len(seen) == 2, "the workers open the file too, and say nothing of it"
    assert hashes(outs[0]) == hashes(outs[1])


def test_models_of_the_hub_are_downloaded_once(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "hub") as hub:
        for role, folder in zip(("base", "aligned"), make_pair(tmp_path, "llama", aligned_shards=2), strict=True):
            hub.put(f"org/{role}", folder)
        environment = hub.environment(tmp_path / "home")
        fetched = []
        for workers in (2, 1):
            start = len(hub.requests)
            call = f"harden('org/base', 'org/aligned', {str(tmp_path / str(workers))!r}, workers={workers})"
            assert run_client(environment, f"from lox_merge import harden; result = {call}.workers") == workers
            fetched.append([request for request in hub.requests[start:] if request.origin == "storage" and request.range is None])
    assert len(fetched[0]) == 3 and not fetched[1]
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")


@pytest.mark.parametrize("recipe", [FilterRecipe(fraction=0.2), FilterRecipe(fraction=0.1, layers=3)], ids=["orthogonal", "layers"])
def test_the_projection_filter(tmp_path: Path, recipe: FilterRecipe) -> None:
    base, aligned = make_pair(tmp_path, "llama", aligned_shards=3)
    finetuned = finetune(aligned, tmp_path / "finetuned")
    outs = [project(base, aligned, finetuned, tmp_path / f"out{workers}", recipe=recipe, workers=workers).out for workers in (1, 2)]
    assert hashes(outs[0]) == hashes(outs[1])


def test_a_killed_worker_s_shard_is_done_again(pair: Pair, expected: dict[str, str], tmp_path: Path) -> None:
    watch = Watch(lambda: workers_of(psutil.Process())[0].kill())
    with pytest.warns(LoxMergeWarning, match="a worker was lost by signal SIGKILL while it wrote model-"):
        result = harden(*pair, tmp_path / "out", workers=2, progress=watch)
    assert hashes(result.out) == expected
    assert watch.total == result.bytes_written


def test_a_shard_whose_workers_are_always_lost_is_named(pair: Pair, expected: dict[str, str], tmp_path: Path) -> None:
    class Murderer:
        def advance(self, count: int) -> None:
            if count > 0:
                for worker in workers_of(psutil.Process()):
                    with contextlib.suppress(psutil.NoSuchProcess):  # one that was killed before goes meanwhile
                        worker.kill()

    out = tmp_path / "out"
    with pytest.warns(LoxMergeWarning, match="a worker was lost"), pytest.raises(LoxMergeError, match="3 workers were lost"):
        harden(*pair, out, workers=2, progress=Murderer())
    assert not list((out / ".lox_merge").glob("*.partial"))
    harden(*pair, out, workers=2)
    assert hashes(out) == expected


def stopped(pair: Pair, folder: Path, sent: signal.Signals) -> tuple[Path, subprocess.Popen[str], str]:
    """An output whose process was sent a signal while its workers wrote; on a busy machine a run may be through before that.
    Ctrl-C goes to all processes of a terminal."""
    for attempt in range(10):
        out = folder / f"out{attempt}"
        command = [*CLI, "harden", *map(str, pair), str(out), "--workers", "2"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        while process.poll() is None and not list((out / ".lox_merge").glob("*.safetensors.*.partial")):
            time.sleep(0.001)
        workers = workers_of(psutil.Process(process.pid)) if process.poll() is None else []
        if sent == signal.SIGINT and process.poll() is None:
            os.killpg(process.pid, sent)
        else:
            process.send_signal(sent)
        _, stderr = process.communicate()
        _, alive = psutil.wait_procs(workers, 5)
        assert not alive, "workers end with the process that started them"
        if process.returncode != 0:
            return out, process, stderr
    raise AssertionError("every run was through before it could be stopped")


def test_interrupted_by_hand_goes_on_in_any_executor(pair: Pair, expected: dict[str, str], tmp_path: Path) -> None:
    out, process, stderr = stopped(pair, tmp_path, signal.SIGINT)
    assert process.returncode == 1
    assert stderr.startswith("error: interrupted.") and "run the same command again" in stderr and "Traceback" not in stderr
    assert not (out / "lox_merge.json").exists()
    assert not list((out / ".lox_merge").glob("*.partial"))
    shutil.copytree(out, tmp_path / "copy")
    harden(*pair, out, workers=1)
    harden(*pair, tmp_path / "copy", workers=2)
    assert hashes(out) == hashes(tmp_path / "copy") == expected


def test_workers_end_with_a_killed_process(pair: Pair, expected: dict[str, str], tmp_path: Path) -> None:
    out, process, _ = stopped(pair, tmp_path, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    harden(*pair, out, workers=3)
    assert hashes(out) == expected


def test_finished_shards_are_taken_over(pair: Pair, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stop() -> None:
        raise KeyboardInterrupt

    class Half(Watch):
        def advance(self, count: int) -> None:
            if len(list((out / ".lox_merge").glob("*.safetensors.json"))) >= 3:
                stop()

    with pytest.raises(LoxMergeError, match="interrupted"):
        harden(*pair, out, workers=2, progress=Half())
    kept = {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    result = harden(*pair, out, workers=2)
    assert result.resumed_shards == len(kept) >= 3
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in kept.items())
    assert hashes(out) == expected


def test_nan_in_a_worker_is_the_serial_message(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", aligned_shards=3)
    for file in sorted(aligned.glob("*.safetensors"))[1:]:
        tensors = load_file(file)
        name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
        tensors[name][0, :3] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
    messages = []
    for workers in (1, 2):
        with pytest.raises(NonFiniteDeltaError) as caught:
            harden(base, aligned, tmp_path / f"out{workers}", workers=workers)
        assert list(caught.value.counts.values()) == [3, 3]
        assert not (tmp_path / f"out{workers}").exists()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_warnings_of_a_worker_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_hardening(*make_pair(tmp_path, "llama", hidden=256), tmp_path / "out")
    job = ShardJob(plan, Journal(plan.out), torch.device("cpu"), SourceHasher([], lambda file: source_path(plan, file)), Watch())
    job.journal.folder.mkdir(parents=True)
    told: list[Any] = []
    orders: SimpleQueue[Any] = SimpleQueue()
    for order in ((0, []), None):
        orders.put(order)
    monkeypatch.setattr("lox_merge.maths.lanczos.LARGEST_PASSES", 3)
    with warnings.catch_warnings():
        serve(WorkerTask(plan, job.device, CrewSize(1, 1), None), orders, lambda *event: told.append(event))
    texts = [event[1] for event in told if event[0] == "warning"]
    assert texts and all("did not converge" in text for text in texts)
    assert [event[:2] for event in told if event[0] == "written"] == [("written", 0)]
    collected = Collected(job, [0])
    with pytest.warns(LoxMergeWarning, match="did not converge"):
        collected.take(Held(), "warning", texts[0])


@pytest.mark.parametrize(
    "error", [PlanError(["one", "two"]), PlanError(["one"]), NonFiniteDeltaError({"a": 3}), NumericalError("no"), OutputError("there"), MemoryError()]
)
def test_errors_survive_the_way_between_processes(error: Exception) -> None:
    arrived = pickle.loads(pickle.dumps(_portable(error)))
    assert type(arrived) is type(error) and str(arrived) == str(error) and vars(arrived) == vars(error)


def test_a_source_that_changes_is_noticed(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", aligned_shards=4, hidden=128)
    out = tmp_path / "out"
    with pytest.raises(LoxMergeError, match="changed while it was being read"):
        harden(base, aligned, out, workers=2, progress=Watch(lambda: os.utime(base / "model.safetensors")))
    assert not list((out / ".lox_merge").glob("*.partial"))
    harden(base, aligned, out, workers=2)
    assert (out / "lox_merge.json").is_file()


def test_the_output_stays_locked(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused = []

    def second() -> None:
        with pytest.raises(OutputError, match="another process is writing"):
            harden(*pair, out, workers=2)
        refused.append(True)

    harden(*pair, out, workers=2, progress=Watch(second))
    assert refused


def test_memory_bounds_the_workers(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_hardening(*pair, tmp_path / "out")
    cpu = torch.device("cpu")
    with pytest.warns(LoxMergeWarning, match=r"5 workers need about .* GB of memory and 1.5 GB are free: 2 of them work"):
        assert settle_workers(5, plan, cpu, 1_500_000_000) == 2
    assert settle_workers(5, plan, cpu, 10**11) == 5
    assert settle_workers("auto", plan, cpu, 0) == 1, "what was not asked for is not missed"
    free = psutil.virtual_memory()._replace(available=10**6)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.warns(LoxMergeWarning, match="1 of them work"):
        result = harden(*pair, tmp_path / "out", workers=2)
    assert result.workers == 1


def test_what_is_refused(pair: Pair, run_cli: RunCli, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="whole number"):
        harden(*pair, tmp_path / "out", workers=0)
    with pytest.raises(RequestError, match="--low-disk"):
        harden(*pair, tmp_path / "out", workers=2, low_disk=True)
    with pytest.raises(RequestError, match="--as-adapter"):
        check_workers("auto", as_adapter=True)
    for text in ("0", "-1", "many", "1.5"):
        with pytest.raises(RequestError, match="--workers"):
            parse_workers(text)
    refused = run_cli("harden", *pair, tmp_path / "out", "--workers", "2", "--as-adapter")
    assert refused.returncode == 2 and "leave --workers out" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_the_dry_run_shows_workers(pair: Pair, run_cli: RunCli, tmp_path: Path) -> None:
    shown = run_cli("harden", *pair, tmp_path / "out", "--workers", "2", "--dry-run", "--json", tmp_path / "plan.json")
    assert shown.returncode == 0, shown.stderr
    assert "workers" in shown.stdout and "2, a shard at a time each" in shown.stdout
    alone = run_cli("harden", *pair, tmp_path / "out", "--dry-run", "--json", tmp_path / "alone.json")
    assert "workers" not in alone.stdout
    two, one = (json.loads((tmp_path / name).read_text()) for name in ("plan.json", "alone.json"))
    assert (one["workers"], two["workers"]) == (1, 2)
    assert two["peak_memory"] > one["peak_memory"]


def test_the_longest_shard_is_begun_first(pair: Pair, tmp_path: Path) -> None:
    plan = plan_hardening(*pair, tmp_path / "out")
    order = longest_first(plan, range(len(plan.shards)))
    costs = [shard_cost(plan, plan.shards[position]) for position in order]
    assert order[0] == 0 and costs == sorted(costs, reverse=True)
    copied = plan_hardening(*pair, tmp_path / "out", recipe=Recipe(include=("embed",)))
    assert shard_cost(copied, copied.shards[3]) < shard_cost(plan, plan.shards[3]), "what is only copied takes less"


def test_each_source_file_is_hashed_by_one_worker(pair: Pair, tmp_path: Path) -> None:
    plan = plan_hardening(*pair, tmp_path / "out")
    order = longest_first(plan, range(len(plan.shards)))
    needed = [shard.sources(plan.checkpoints) for shard in plan.shards]
    hasher = SourceHasher(needed, lambda file: source_path(plan, file), ahead=0)
    there = hasher.hashes(order[-1])  # of a shard that was finished before
    ledger = SourceLedger(ShardJob(plan, Journal(plan.out), torch.device("cpu"), hasher, Watch()), order[:-1])
    given = [file for position in order[:-1] for file in ledger.to_hash(position)]
    assert len(given) == len(set(given))
    assert set(given) == {file for files in needed for file in files} - there.keys()
    assert not ledger.complete(order[0])
    for file in given:
        ledger.found(file, "digest")
    assert ledger.complete(order[0]) and not ledger.to_hash(order[0])
    hasher.close()


def test_workers_take_devices_in_turn() -> None:
    gpus = [torch.device("cuda", index) for index in range(3)]
    assert [in_turn(gpus, worker).index for worker in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert devices_of(torch.device("cuda:1")) == [torch.device("cuda:1")]
    assert devices_of(torch.device("cpu")) == [torch.device("cpu")]


def test_a_matrix_takes_as_many_cores_with_any_number_of_workers() -> None:
    alone = CrewSize(6, 4)
    assert [alone.shared(workers) for workers in (1, 2, 4, 9)] == [CrewSize(6, 4), CrewSize(3, 4), CrewSize(1, 4), CrewSize(1, 4)]


def test_thread_counts_change_the_result_less_than_its_certificate() -> None:
    """The order of sums follows the number of threads, so bytes may: by about float32's precision, a thousandth of what is certified."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(16000, 64, generator=generator) * torch.arange(1, 65).float() ** -0.8 @ torch.randn(64, 512, generator=generator)
    delta = low / low.norm() + torch.randn(16000, 512, generator=generator) * 0.5 / (16000 * 512) ** 0.5
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 1, 4):
            torch.set_num_threads(threads)
            found.append(truncated_svd(delta, 6))
    finally:
        torch.set_num_threads(before)
    one, again, other = ((subspace.left.double() * subspace.singular_values) @ subspace.right.double().T for subspace in found)
    assert torch.equal(one, again)
    difference = float((one - other).norm())
    bound = found[0].certificate.projection_error_bound + found[2].certificate.projection_error_bound
    assert difference <= bound
    assert difference <= 1e-6 * float(one.norm()), f"{difference / float(one.norm()):.1e} of the projection's norm"
