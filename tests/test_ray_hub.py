"""Workers that share no storage: each downloads what its shard needs and uploads its shard; one commit shows what a serial push shows."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from adapters import make_adapter
from hub_clients import TOKENS, LoopbackHub, files_under, run_client
from publishers import Done, Publisher
from ray_machines import Machines
from tiny_models import make_pair

READY = ("lox_merge.jobs.harden", "ray", "lox_merge.publish.sent", "lox_merge.cli.harden", "lox_merge.cli.adapter")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path_factory.mktemp("hub"), TOKENS) as hub:
        pair = make_pair(tmp_path_factory.mktemp("pair"), "llama", base_shards=2, aligned_shards=5, hidden=128, layers=4, vocabulary=500)
        adapter = make_adapter(pair[0], tmp_path_factory.mktemp("adapter") / "adapter")
        for role, folder in zip(("base", "aligned", "adapter"), (*pair, adapter), strict=True):
            (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
            hub.put(f"owner/{role}", folder)
        yield hub


@pytest.fixture(scope="module")
def machines(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    with Machines(hub, tmp_path_factory.mktemp("machines")) as machines:
        yield machines


@pytest.fixture(scope="module")
def publisher(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Publisher]:
    with Publisher(hub, tmp_path_factory.mktemp("home"), READY) as publisher:
        yield publisher


def job(out: Path, repo: str, *arguments: object, rank: int = 4) -> list[object]:
    return ["harden", "owner/base", "owner/aligned", out, "--rank", rank, "--push", repo, *arguments]


AWAY = ("--weights-on-hub", "--executor", "ray", "--json", "-")


def published(hub: LoopbackHub, repo: str, branch: str = "main") -> dict[str, str]:
    return {name: file.sha256 for name, file in hub.repositories[repo].files(branch).items()}


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to it"
        time.sleep(0.02)


class Hold:
    """Keeps uploads waiting after so many that pass, until the block ends. `reached` is set when one waits."""

    def __init__(self, hub: LoopbackHub, passing: int = 0) -> None:
        self.reached, self._go, self._hub = threading.Event(), threading.Event(), hub
        if passing:
            hub.fail("PUT /lfs/", times=passing)
        hub.fail("PUT /lfs/", times=99, meanwhile=self._wait)

    def _wait(self) -> None:
        self.reached.set()
        self._go.wait(60)

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *details: object) -> None:
        self._hub.faults.clear()
        self._go.set()


def sent_shards(out: Path) -> set[str]:
    """Files whose records say that the Hub holds them."""
    records = [json.loads(path.read_text()) for path in (out / ".lox_merge").glob("model-*.json")]
    return {record["output"]["file"] for record in records if record["sent"]}


def stopped_after_the_first(hub: LoopbackHub, publisher: Publisher, out: Path, order: list[object], address: str) -> Done:
    """Ctrl-C once the first shard is recorded as sent, while the next one is on its way."""
    with Hold(hub, passing=1):
        child = publisher.start(*order, "--workers", 1, RAY_ADDRESS=address)
        until(lambda: sent_shards(out))
        os.kill(child, signal.SIGINT)
        return publisher.finish()


def finished_although_all_workers_are_killed(hub: LoopbackHub, machines: Machines, publisher: Publisher, order: list[object]) -> Done:
    """They are killed while a shard is on its way; the storage fails once, too."""
    hub.fail("PUT /lfs/", status=500)
    with Hold(hub) as hold:
        publisher.start(*order, "--workers", 2, RAY_ADDRESS=machines.address)
        assert hold.reached.wait(100)
        for worker in machines.workers():  # one of them may have nothing to do
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
    return publisher.finish()


def test_a_job_that_is_stopped_and_loses_its_workers_publishes_what_a_serial_one_does(
    hub: LoopbackHub, machines: Machines, publisher: Publisher, tmp_path: Path
) -> None:
    out, repo, start = tmp_path / "away" / "out", "owner/hardened", len(hub.requests)
    beside = ("--revision", "hardened")  # a branch that is made for it
    order = job(out, repo, *AWAY, *beside)
    stopped = stopped_after_the_first(hub, publisher, out, order, machines.address)
    assert stopped.returncode == 1 and "sent are kept out of sight on the Hub; run the same command again" in stopped.stderr, stopped.stderr
    assert set(published(hub, repo, "hardened")) == {".gitattributes"} and hub.repositories[repo].private, "nothing shows before the commit"
    before = sent_shards(out)
    until(lambda: not machines.workers())

    done = finished_although_all_workers_are_killed(hub, machines, publisher, order)
    assert done.returncode == 0, done.stderr
    assert "a worker was lost by the end of its process or machine while it wrote model-" in done.stderr
    assert done.json["resumed_shards"] == len(before) >= 1 and done.json["workers"] == 2
    whole = [request.path for request in hub.requests[start:] if request.method == "PUT" and request.status == 200]
    assert len(set(whole)) == len(whole), "nothing is uploaded twice"
    until(lambda: not machines.workers())
    assert not machines.left_behind(), "not of those that were killed either"

    found, repository = published(hub, repo, "hardened"), hub.repositories[repo]
    assert set(published(hub, repo)) == {".gitattributes"}, "the main branch stays what it is"
    commit = done.json["push"]["commit"]
    assert repository.private and len(repository.commits) == 2, "the Hub's own commit and ours"
    here = files_under(out)
    assert set(here) == {name for name in found if not name.endswith((".safetensors", ".gitattributes"))} | {"lox_merge_weights.json"}
    assert json.loads((out / "lox_merge_weights.json").read_text())["commit"] == commit

    again = publisher.run(*order)
    assert again.returncode == 0 and again.json["push"]["commit"] == commit and again.json["push"]["sent"] == []
    assert again.json["bytes_written"] == 0 and len(repository.commits) == 2
    checked = publisher.run("verify", f"{repo}@{commit}", "--json", "-")
    assert checked.returncode == 0 and checked.json["ok"] and checked.json["sources_checked"]
    for command in (["verify", out], ["push", out, repo]):
        refused = publisher.run(*command)
        assert refused.returncode == 2 and "holds no weights: they are on the Hub" in refused.stderr
    other = publisher.run(*job(out, repo))
    assert other.returncode == 2 and f"are in {repo} on the Hub, and are to be in this folder" in other.stderr

    del hub.repositories[repo]
    serial = publisher.run(*job(tmp_path / "serial" / "out", repo, *beside))
    assert serial.returncode == 0, serial.stderr
    assert published(hub, repo, "hardened") == found, "the card too"
    other = publisher.run(*job(tmp_path / "serial" / "out", repo, *AWAY))
    assert other.returncode == 2 and f"are in this folder, and are to be in {repo} on the Hub" in other.stderr


def test_a_driver_that_is_killed_is_gone_on_with(hub: LoopbackHub, machines: Machines, publisher: Publisher, tmp_path: Path) -> None:
    """Its workers end with it, and the next run of the command sends what is left."""
    out, repo, start = tmp_path / "out", "owner/driver-killed", len(hub.requests)
    order = job(out, repo, *AWAY, rank=3)
    with Hold(hub, passing=1):
        driver = publisher.start(*order, "--workers", 1, RAY_ADDRESS=machines.address)
        until(lambda: sent_shards(out))
        os.kill(driver, signal.SIGKILL)
        assert publisher.finish().returncode == -signal.SIGKILL
        until(lambda: not machines.workers())
    sent = sent_shards(out)
    assert set(published(hub, repo)) == {".gitattributes"} and not (out / "lox_merge.json").exists()
    done = publisher.run(*order, "--workers", 1, RAY_ADDRESS=machines.address)
    assert done.returncode == 0, done.stderr
    assert done.json["resumed_shards"] == len(sent) >= 1
    whole = [request.path for request in hub.requests[start:] if request.method == "PUT" and request.status == 200]
    assert len(set(whole)) == len(whole), "nothing is uploaded twice"
    assert publisher.run("harden", "owner/base", "owner/aligned", tmp_path / "here", "--rank", 3).returncode == 0
    here = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "here").glob("*.safetensors")}
    found = published(hub, repo)
    assert len(here) == 5 and {name: found[name] for name in here} == here
    until(lambda: not machines.workers())
    assert not machines.left_behind()


# Workers in a process of their own, without Ray


_WORKERS = """
import os, pickle
from queue import SimpleQueue
import torch
from lox_merge.jobs.executors.worker import serve
from lox_merge.jobs.executors.writer import WorkerTask
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.store import plan_for_elsewhere
from lox_merge.jobs.work import CrewSize
from lox_merge.publish.access import check_can_push
from lox_merge.publish.hub_store import HubStore

def work(aligned, repo, positions, dismissed, place):
    plan = plan_hardening("owner/base", aligned, place + "/whoever-out", cache_dir=Path(place, "whoever-cache"))
    plan.store = HubStore.of(check_can_push(repo))
    plan.store.prepare()
    travels = pickle.dumps(WorkerTask(plan_for_elsewhere(plan), torch.device("cpu"), CrewSize(1, 1), None))
    task, folder, told, most = pickle.loads(travels), Path(place, "worker"), [], 0
    folder.mkdir(parents=True)
    orders = SimpleQueue()
    for position in positions:
        orders.put((position, task.plan.shards[position].sources(task.plan.checkpoints)))
    if dismissed:
        orders.put(None)

    def tell(kind, *values):
        nonlocal most
        told.append((kind, *values))
        if kind == "failed":
            orders.put(None)
        files = [path.name for path in folder.glob("out/.lox_merge/downloads/*/models--*/snapshots/*/*")]
        most = max(most, len(files))

    serve(task, orders, tell, folder)
    return {
        "names": [word for word in ("whoever", place, os.environ["HF_TOKEN"]) if word.encode() in travels],
        "kinds": [kind for kind, *_ in told if kind not in ("bytes", "hashed")],
        "failures": [f"{type(values[0]).__name__}: {values[0]}" for kind, *values in told if kind == "failed"],
        "written": [values[1]["output"] for kind, *values in told if kind == "written"],
        "most": most,
        "left": [str(path) for path in folder.rglob("*") if path.is_file()],
    }

result = [work(*case) for case in CASES]
"""


@pytest.fixture(scope="module")
def worked(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What workers told, by the repository that they sent to."""
    places = tmp_path_factory.mktemp("workers")
    cases: list[tuple[str, str, list[int], bool, str]] = [
        ("owner/aligned", "owner/two-shards", [0, 4], True, str(places / "a")),
        ("owner/adapter", "owner/of-adapter", [0], True, str(places / "b")),
        ("owner/aligned", "owner/refusing", [1], False, str(places / "c")),
    ]
    hub.fail("POST /owner/refusing.git/info/lfs/", times=99, status=403, message="no more")
    found = run_client(hub.environment(places / "home", token="owner-token"), f"CASES = {cases!r}\n{_WORKERS}")
    hub.faults.clear()
    return {case[1]: told for case, told in zip(cases, found, strict=True)}


def test_a_worker_has_the_files_of_one_shard_and_knows_nothing_of_whoever_asked(hub: LoopbackHub, worked: dict[str, Any]) -> None:
    told = worked["owner/two-shards"]
    assert told["names"] == [], "no folder and no token travels"
    assert sorted(told["kinds"]) == ["free", "free", "started", "written", "written"]
    assert len(told["written"]) == 2 and all(hub.blobs.holds(output["sha256"], output["size"]) for output in told["written"])
    assert told["most"] == 2, "one file of aligned and one of base, although each shard needs another one of base"
    assert told["left"] == [] and set(published(hub, "owner/two-shards")) == {".gitattributes"}


def test_an_adapter_on_the_hub(hub: LoopbackHub, worked: dict[str, Any]) -> None:
    told = worked["owner/of-adapter"]
    (output,) = told["written"]
    assert hub.blobs.holds(output["sha256"], output["size"]) and told["left"] == [] and told["names"] == []


def test_a_hub_that_takes_no_shard_is_told_although_no_order_follows(worked: dict[str, Any]) -> None:
    told = worked["owner/refusing"]
    (failure,) = told["failures"]
    assert failure.startswith("RequestError: owner/refusing: the Hub does not let the token in use write there")
    assert told["written"] == [] and told["left"] == []


# Refusals


def test_what_is_refused_before_anything_is_made(hub: LoopbackHub, publisher: Publisher, tmp_path: Path) -> None:
    out, repo = tmp_path / "out", "owner/refused"
    (tmp_path / "local").mkdir()
    for name, file in hub.repositories["owner/base"].files("main").items():
        shutil.copy(hub.blobs.path(file.sha256), tmp_path / "local" / name)
    local = ["harden", tmp_path / "local", "owner/aligned", out, "--push", repo, "--license", "mit", *AWAY]
    cases: dict[str, list[object]] = {
        "base: local is a folder of this machine, which workers elsewhere do not see": local,
        "it goes with --executor ray": job(out, repo, "--weights-on-hub"),
        "goes with --push REPO": ["harden", "owner/base", "owner/aligned", out, *AWAY],
        "does not go with --low-disk": job(out, repo, *AWAY, "--low-disk"),
        "does not go with --as-adapter": job(out, repo, *AWAY, "--as-adapter"),
        "does not go with --pull-request": job(out, repo, *AWAY, "--pull-request"),
        "stranger is somebody else": job(out, "stranger/model", *AWAY),
    }
    for words, order in cases.items():
        refused = publisher.run(*order)
        assert refused.returncode == 2 and words in refused.stderr, (words, refused.stderr)
    hub.put("owner/copy", tmp_path / "local")
    same = publisher.run("harden", "owner/base", "owner/copy", out, "--push", repo, *AWAY, "--order-is-right")
    assert same.returncode == 2 and "hold the same weights" in same.stderr
    assert repo not in hub.repositories and not out.exists()
    shown = publisher.run(*job(out, repo, *AWAY[:-2], "--dry-run"))
    assert shown.returncode == 0 and f"to {repo} on the Hub" in shown.stdout and repo not in hub.repositories


def test_uploads_that_the_hub_lost_are_made_again(hub: LoopbackHub, publisher: Publisher, tmp_path: Path) -> None:
    """The state of a job whose shards were all sent, and one is gone since."""
    out, repo = tmp_path / "out", "owner/lost"
    assert publisher.run(*job(out, repo, rank=2)).returncode == 0
    manifest = json.loads((out / "lox_merge.json").read_text())
    attributes = {".gitattributes": hub.repositories[repo].files("main")[".gitattributes"]}
    hub.new_repository(repo, private=True).commit("main", attributes, "initial commit")
    work = out / ".lox_merge"
    work.mkdir()
    (work / "job.json").write_text(json.dumps(manifest["job"]))
    (work / "store.json").write_text(json.dumps({"repository": repo, "branch": "main"}))
    sources = {role: {} for role in manifest["sources"]}
    for output in manifest["output"]["shards"]:
        record = {"output": output, "sources": sources, "tensors": [], "sent": True}
        (work / f"{output['file']}.json").write_text(json.dumps(record))
        (out / output["file"]).unlink()
    lost = manifest["output"]["shards"][3]
    hub.blobs.path(lost["sha256"]).unlink()
    done = publisher.run(*job(out, repo, *AWAY, rank=2))
    assert done.returncode == 1 and f"does not hold what was uploaded of {lost['file']} any more" in done.stderr, done.stderr
    assert sent_shards(out) == {output["file"] for output in manifest["output"]["shards"]} - {lost["file"]}
    assert not (out / "lox_merge.json").exists() and set(published(hub, repo)) == {".gitattributes"}
