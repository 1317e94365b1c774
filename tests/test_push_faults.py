"""`push` when the Hub fails, the connection breaks, the branch moves, or the upload is killed: got over, or said, and gone on with."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hub_clients import LoopbackHub
from publishers import Publisher
from push_fixtures import assert_published, refused, sent_bytes, since, stored

from lox_merge import Recipe, harden

UP = "model-00002-of-00003.safetensors"
HALF = "POST /api/models/owner/{}/commit/"

COMMIT, TAG, PREUPLOAD = ("POST /api/models/{}/" + name + "/" for name in ("commit", "tag", "preupload"))
CREATE, BATCH, STORAGE, VALIDATE = "POST /api/repos/create", "POST /{}.git/info/lfs/objects/batch", "PUT /lfs/", "POST /api/validate-yaml"
FAULTS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "500 from everybody": ([CREATE, VALIDATE, PREUPLOAD, BATCH, STORAGE, COMMIT, TAG], {"status": 500}),
    "503 from those who change something": ([CREATE, COMMIT, COMMIT, TAG], {"status": 503}),
    "cut in the middle of a shard": ([STORAGE], {"cut_after": 5_000}),
    "cut gently in the middle of a shard": ([STORAGE], {"cut_after": 5_000, "reset": False}),
    "cut in the middle of the commit": ([COMMIT], {"cut_after": 100}),
    "the answer of the commit lost": ([COMMIT], {"cut_after": -1}),
    "all answers lost": ([CREATE, VALIDATE, PREUPLOAD, BATCH, STORAGE, COMMIT, TAG], {"cut_after": -1}),
}


@pytest.mark.parametrize("case", FAULTS)
def test_passing_faults_are_got_over(
    case: str, hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], repo: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # Weights of its own: what another test stored would not be sent again.
    harden(made[0], made[1], out, recipe=Recipe(rank=1, alpha=1 + (list(FAULTS).index(case) + 1) / 100))
    patterns, settings = FAULTS[case]
    for pattern in patterns:
        hub.fail(pattern.format(repo), **settings)
    done = publisher.push(out, repo, "--json", "-")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert_published(hub, repo, out)
    repository = hub.repositories[repo]
    assert len(repository.commits) == 2 and repository.tags == {"lox-merge-v0.1.0": repository.branches["main"]}
    assert done.json["commit"] == repository.branches["main"] and repository.private


@pytest.mark.parametrize("request_line", ["POST /api/models/{}/commit/", "GET /api/models/{}$"])
def test_a_request_limit_is_waited_for(request_line: str, hub: LoopbackHub, publisher: Publisher, out: Path, repo: str) -> None:
    hub.fail(request_line.format(repo), status=429, headers={"Retry-After": "41"})
    done = publisher.push(out, repo)
    assert done.returncode == 0, done.stderr
    assert [wait for wait in done.waits if wait >= 41] == done.waits and len(done.waits) == 1
    assert_published(hub, repo, out)


def test_a_long_request_limit_is_said(hub: LoopbackHub, publisher: Publisher, out: Path, repo: str) -> None:
    hub.fail(HALF.format(repo.removeprefix("owner/")), status=429, headers={"RateLimit": '"api";r=0;t=3000'})
    done = publisher.push(out, repo)
    refused(done, "limits the number of requests (429)", "Wait 3000 seconds", "run the same command again", code=1)
    assert done.waits == []


FULL = "Private repository storage limit reached"
LASTING: dict[str, tuple[str, dict[str, Any], int, list[str]]] = {
    "quota, 403": ("POST /api/models/{}/preupload/", {"status": 403, "message": FULL}, 1, ["does not take that much (403)", "storage limit"]),
    "quota, 413": ("PUT /lfs/", {"status": 413, "message": "Payload Too Large"}, 1, ["does not take that much (413)"]),
    "quota, 413 on the commit": ("POST /api/models/{}/commit/", {"status": 413}, 1, ["does not take that much (413)"]),
    "access withdrawn": ("POST /api/models/{}/commit/", {"status": 403}, 2, ["does not let the token in use write there"]),
    "trouble that lasts": ("POST /api/models/{}/commit/", {"status": 502}, 1, ["trouble of its own (502)", "run the same command again"]),
    "connections that always break": ("POST /api/models/{}/commit/", {"cut_after": 10}, 1, ["the connection to the Hub broke"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LASTING)
def test_a_lasting_fault_is_said_and_the_same_command_goes_on(
    case: str, hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], repo: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    harden(made[0], made[1], out, recipe=Recipe(rank=1, alpha=2 + (list(LASTING).index(case) + 1) / 100))
    pattern, settings, code, words = LASTING[case]
    hub.fail(pattern.format(repo), times=99, **settings)
    refused(publisher.push(out, repo), *words, code=code)
    hub.faults.clear()
    assert stored(hub, repo) == {}  # nobody sees half a model
    start = len(hub.requests)
    done = publisher.push(out, repo, "--json", "-")
    assert done.returncode == 0, done.stderr
    assert_published(hub, repo, out)
    if "commit" in pattern:  # the shards were there
        assert not [request for request in since(hub, start) if request.method == "PUT"]


KEPT = "What was uploaded is kept; run the same command again to go on."
EARLY = ["GET /api/whoami-v2", CREATE, VALIDATE, PREUPLOAD, "POST /{}.git/info/lfs/objects/batch"]


@pytest.mark.parametrize("moment", [*EARLY, COMMIT, TAG])
def test_only_what_was_uploaded_is_said_to_be_kept(
    moment: str, hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], repo: str, tmp_path: Path
) -> None:
    harden(made[0], made[1], tmp_path / "out", recipe=Recipe(rank=1, alpha=7 + len(moment) / 100))
    hub.fail(moment.format(repo), times=99, status=502)
    done = publisher.push(tmp_path / "out", repo)
    hub.faults.clear()
    refused(done, "trouble of its own (502)", "Wait a few minutes.", code=1)
    assert (KEPT in done.stderr) == (moment not in EARLY)
    assert ("Run the same command again." in done.stderr) == (moment in EARLY)


@pytest.mark.parametrize(("status", "code", "words"), [(403, 2, "does not let the token in use write there"), (502, 1, "trouble of its own (502)")])
def test_xet_storage_that_is_refused_is_said(
    status: int, code: int, words: str, hub: LoopbackHub, publisher: Publisher, out: Path, repo: str
) -> None:
    hub.fail(f"GET /api/models/{repo}/xet-write-token/", times=99, status=status)
    refused(publisher.push(out, repo, xet=True), words, code=code)
    hub.faults.clear()
    assert stored(hub, repo) == {}
    hub.fail(f"GET /api/models/{repo}/xet-write-token/", status=503)
    assert publisher.push(out, repo, xet=True).returncode == 0
    assert_published(hub, repo, out)


def test_a_branch_that_moved_meanwhile_is_left_alone(hub: LoopbackHub, publisher: Publisher, out: Path, repo: str) -> None:
    def somebody() -> None:
        repository = hub.repositories[repo]
        repository.commit("main", {**repository.files("main"), "other.txt": repository.files("main")[".gitattributes"]}, "somebody else")

    hub.fail(f"POST /api/models/{repo}/commit/", meanwhile=somebody)
    refused(publisher.push(out, repo), "somebody else changed main meanwhile", "Nothing of this was committed", code=1)
    assert list(stored(hub, repo)) == ["other.txt"]
    assert publisher.push(out, repo).returncode == 0
    assert "other.txt" in stored(hub, repo)


@pytest.mark.parametrize(
    ("moment", "file", "xet"),
    [(CREATE, UP, False), (CREATE, UP, True), (PREUPLOAD, UP, False), (STORAGE, UP, False), (STORAGE, "config.json", False)],
)
def test_a_file_that_changes_after_the_check_is_not_committed(
    moment: str, file: str, xet: bool, hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], repo: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    alpha = 3 + (1 + len(moment) + 50 * (file == UP)) / 1000
    harden(made[0], made[1], out, recipe=Recipe(rank=1, alpha=alpha))

    def change() -> None:
        data, before = bytearray((out / file).read_bytes()), (out / file).stat()
        data[-3] ^= 1
        (out / file).write_bytes(data)
        if moment == CREATE:  # so that only the bytes tell
            os.utime(out / file, ns=(before.st_atime_ns, before.st_mtime_ns))

    hub.fail(moment.format(repo), meanwhile=change)
    refused(publisher.push(out, repo, xet=xet), f"{file} changed after it was checked", code=1)
    assert stored(hub, repo) == {}


def test_a_gitignore_that_leaves_out_a_file_is_said(hub: LoopbackHub, publisher: Publisher, out: Path, repo: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / ".gitignore").write_text("config.json\n")
    hub.put(repo, tmp_path / "there", private=True)
    refused(publisher.push(out, repo), ".gitignore keeps config.json out", code=1)
    assert list(stored(hub, repo)) == [".gitignore"]


@pytest.mark.parametrize("moment", ["while uploading", "while committing"])
@pytest.mark.parametrize("xet", [False, True], ids=["LFS", "Xet"])
def test_a_killed_upload_is_gone_on_with(
    moment: str, xet: bool, hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], repo: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    harden(made[0], made[1], out, recipe=Recipe(rank=1, alpha=4.0 + xet + (moment == "while uploading") / 2))
    uploading = f"GET /api/models/{repo}/xet-write-token/" if xet else "PUT /lfs/"
    hub.fail(uploading if moment == "while uploading" else f"POST /api/models/{repo}/commit/", pause=1)
    child = publisher.start("push", out, repo, "--license", "mit", xet=xet)
    deadline = time.monotonic() + 60
    while hub.faults.left() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)  # the Hub looks at the request in a second, and the client sends the rest of it meanwhile
    os.kill(child, signal.SIGKILL)
    assert publisher.finish().returncode == -signal.SIGKILL
    start = len(hub.requests)  # waits for the request under way: the Hub had all of a commit, and makes it though nobody waits for the answer
    half = stored(hub, repo)
    assert (half == {}) == (moment == "while uploading")
    done = publisher.run("push", out, repo, "--license", "mit", xet=xet)
    assert done.returncode == 0, done.stderr
    assert_published(hub, repo, out)
    repository = hub.repositories[repo]
    assert len(repository.commits) == 2 and repository.tags == {"lox-merge-v0.1.0": repository.branches["main"]}
    if moment == "while committing":
        assert sent_bytes(since(hub, start)) == 0


def test_a_stopped_upload_says_how_to_go_on(hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], repo: str, tmp_path: Path) -> None:
    harden(made[0], made[1], tmp_path / "out", recipe=Recipe(rank=1, alpha=6.0))
    hub.fail("PUT /lfs/", pause=1)
    child = publisher.start("push", tmp_path / "out", repo, "--license", "mit")
    deadline = time.monotonic() + 60
    while hub.faults.left() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child, signal.SIGTERM)
    refused(publisher.finish(), "interrupted", "run the same command again to go on", code=1)
    assert stored(hub, repo) == {}
