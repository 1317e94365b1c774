"""Files of the Hub in the ordinary cache: fetched once, continued after failures, and used offline."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hub_clients import LARGE, LONG_HEADER, LoopbackHub, client_command, files_under, names_a_server, run_client

pytest_plugins = ("hub_fixtures",)

DOWNLOAD = "result = str(hub.download(resolve('owner/model'), {!r}))"
BOTH = [LARGE, LONG_HEADER]


def assert_same_files(folder: Path, model: Path, names: list[str]) -> None:
    assert files_under(folder) == sorted(names)
    for name in names:
        assert (folder / name).read_bytes() == (model / name).read_bytes()


def cache_of(hub_home: Path) -> Path:
    return hub_home / "hub" / "models--owner--model"


@pytest.mark.parametrize("xet", [False, True], ids=["LFS", "Xet"])
def test_only_the_named_files_arrive_and_only_once(xet: bool, loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    commit = loopback_hub.put("owner/model", hub_model, private=True, xet=xet)
    names = [LARGE, "config.json", "tokenizer/vocab.json"]
    environment = loopback_hub.environment(hub_home, token="owner-token", xet=xet)
    folder = Path(run_client(environment, DOWNLOAD.format(names)))
    assert folder == cache_of(hub_home) / "snapshots" / commit
    assert_same_files(folder, hub_model, names)
    assert (cache_of(hub_home) / "refs" / "main").read_text() == commit
    # As other tools look it up.
    lookup = "import huggingface_hub; result = huggingface_hub.try_to_load_from_cache('owner/model', 'tokenizer/vocab.json')"
    assert run_client(environment, lookup) == str(folder / "tokenizer" / "vocab.json")
    storage = [request for request in loopback_hub.requests if request.origin == "storage"]
    assert len(storage) == (0 if xet else 1)  # Xet content comes from its own store
    assert [request for request in storage if request.authorization] == []

    before = len(loopback_hub.requests)
    assert run_client(environment, DOWNLOAD.format(names)) == str(folder)
    again = loopback_hub.requests[before:]
    assert [request for request in again if request in loopback_hub.content_requests()] == []
    assert [request.path.split("/")[-1] for request in again] == ["model", LARGE]  # what resolving asks for, and nothing more


def test_a_snapshot_keeps_its_commit_when_the_branch_moves_on(loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path, tmp_path: Path) -> None:
    environment = loopback_hub.environment(hub_home)
    kept = tmp_path / "snapshot"
    loopback_hub.put("owner/model", hub_model)
    run_client(environment, f"Path({str(kept)!r}).write_bytes(pickle.dumps(resolve('owner/model')))")
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "config.json").write_text('{"model_type": "another"}')
    loopback_hub.put("owner/model", newer)
    body = f"s = pickle.loads(Path({str(kept)!r}).read_bytes()); result = str(hub.download(s, ['config.json']))"
    assert_same_files(Path(run_client(environment, body)), hub_model, ["config.json"])


@pytest.mark.parametrize("reset", [True, False], ids=["RST", "FIN"])
def test_a_connection_cut_midway_is_overcome(reset: bool, loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    loopback_hub.put("owner/model", hub_model)
    loopback_hub.fail("GET /lfs/", cut_after=1_000_000, reset=reset)
    folder = Path(run_client(loopback_hub.environment(hub_home), DOWNLOAD.format([LARGE])))
    assert_same_files(folder, hub_model, [LARGE])
    assert len([request for request in loopback_hub.requests if request.origin == "storage"]) == 2


def test_what_failed_is_reported_and_continued_by_the_same_call(loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    loopback_hub.put("owner/model", hub_model)
    large = loopback_hub.repositories["owner/model"].files("main")[LARGE].sha256
    loopback_hub.fail(f"GET /lfs/{large}", times=3, cut_after=1_000_000)
    environment = loopback_hub.environment(hub_home)
    body = f"s = resolve('owner/model'); hub.download(s, [{LONG_HEADER!r}]); result = attempt(lambda: str(hub.download(s, {BOTH})))"
    answer = run_client(environment, body)
    assert answer["error"] == "SourceError"
    assert f"owner/model/{LARGE}: the connection to the Hub broke. Try again" in answer["message"]
    assert files_under(cache_of(hub_home) / "snapshots") == [f"{next((cache_of(hub_home) / 'snapshots').iterdir()).name}/{LONG_HEADER}"]

    before = len(loopback_hub.requests)
    folder = Path(run_client(environment, DOWNLOAD.format(BOTH)))
    assert_same_files(folder, hub_model, BOTH)
    assert [request.path for request in loopback_hub.requests[before:] if request.origin == "storage"] == [f"/lfs/{large}"]


@pytest.mark.parametrize("request_line", ["GET /lfs/", "HEAD /owner/model/resolve/.*/config.json"])
def test_access_withdrawn_after_resolving_is_reported(request_line: str, loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    loopback_hub.put("owner/model", hub_model)
    loopback_hub.fail(request_line, times=99, status=403)
    body = f"s = resolve('owner/model'); result = attempt(lambda: str(hub.download(s, {['config.json', *BOTH]})))"
    answer = run_client(loopback_hub.environment(hub_home), body)
    assert answer["error"] == "SourceError"
    assert 'refuses access with the token in use (the Hub says: "injected fault")' in answer["message"]
    assert not names_a_server(answer["message"])


def test_a_truncated_file_in_the_cache_is_fetched_again(loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    loopback_hub.put("owner/model", hub_model)
    environment = loopback_hub.environment(hub_home)
    folder = Path(run_client(environment, DOWNLOAD.format(BOTH)))
    os.truncate(folder / LARGE, 1000)
    run_client(environment, DOWNLOAD.format(BOTH))
    assert_same_files(folder, hub_model, BOTH)


def test_a_full_or_forbidden_disk_names_the_place(loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path, tmp_path: Path) -> None:
    loopback_hub.put("owner/model", hub_model)
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the cache should be")
    body = f"s = resolve('owner/model'); result = attempt(lambda: str(hub.download(s, ['config.json'], Path({str(blocked)!r}))))"
    answer = run_client(loopback_hub.environment(hub_home), body)
    assert answer["error"] == "SourceError"
    assert "cannot be kept in the local cache" in answer["message"]
    assert str(blocked) in answer["message"]
    assert "HF_HOME" in answer["message"]


def test_ctrl_c_ends_a_slow_download_soon_and_leaves_it_resumable(loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    loopback_hub.put("owner/model", hub_model)
    large = loopback_hub.repositories["owner/model"].files("main")[LARGE].sha256
    loopback_hub.fail(f"GET /lfs/{large}", pause=0.5)  # 45 seconds for the whole file
    environment = {**loopback_hub.environment(hub_home), "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
    process = subprocess.Popen(client_command(DOWNLOAD.format(BOTH)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    blobs = cache_of(hub_home) / "blobs"
    deadline = time.monotonic() + 30
    while not list(blobs.glob("*.incomplete")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, errors = process.communicate(timeout=40)
    assert time.monotonic() - began < 8
    assert "KeyboardInterrupt" in errors
    assert list(blobs.glob("*.incomplete")) == []
    folder = Path(run_client(loopback_hub.environment(hub_home), DOWNLOAD.format(BOTH)))
    assert_same_files(folder, hub_model, BOTH)


def test_a_terminal_sees_one_bar_and_a_pipe_none(loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    loopback_hub.put("owner/model", hub_model)
    environment = {**loopback_hub.environment(hub_home), "TERM": "xterm"}
    del environment["HF_HUB_DISABLE_PROGRESS_BARS"]
    piped = subprocess.run(client_command(DOWNLOAD.format(["config.json", *BOTH])), env=environment, capture_output=True, text=True)
    assert (piped.returncode, piped.stderr) == (0, "")
    shutil.rmtree(hub_home)
    shown = on_a_terminal(client_command(DOWNLOAD.format(["config.json", *BOTH])), environment)
    bars = {line.split(":")[0] for line in re.split(r"[\r\n]+", shown) if "%|" in line}
    assert bars == {"Downloading owner/model"}
    assert "100%|" in shown


def on_a_terminal(command: list[str], environment: dict[str, str]) -> str:
    """What the command writes to a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    with subprocess.Popen(command, env=environment, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        written = b""
        with suppress(OSError):  # Linux ends a terminal's output with EIO
            while piece := os.read(ours, 65536):
                written += piece
        os.close(ours)
    assert process.returncode == 0, written.decode()
    return written.decode()


# Offline


def test_offline_the_cache_answers_without_a_request(loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    commit = loopback_hub.put("owner/model", hub_model)
    folder = run_client(loopback_hub.environment(hub_home), DOWNLOAD.format([LARGE, "config.json"]))
    before = len(loopback_hub.requests)
    body = (
        "s = resolve('owner/model'); t = resolve(f'owner/model@{s.commit}'); "
        f"result = [s.commit, t.commit, sorted(s.files), s.files[{LARGE!r}].size, s.files[{LARGE!r}].sha256, "
        f"len(hub.read_safetensors_header(s, {LARGE!r})), str(hub.download(s, [{LARGE!r}, 'config.json'])), "
        f"attempt(lambda: hub.read_safetensors_header(s, {LONG_HEADER!r})), attempt(lambda: hub.download(s, {BOTH}))]"
    )
    first, second, names, size, sha256, header, again, *missing = run_client(loopback_hub.environment(hub_home, offline=True), body)
    assert first == second == commit
    assert names == files_under(hub_model)  # the whole list, so that a file never fetched is missed
    assert (size, sha256) == ((hub_model / LARGE).stat().st_size, loopback_hub.repositories["owner/model"].files("main")[LARGE].sha256)
    assert 8 < header < 1000
    assert again == folder
    for answer in missing:
        assert answer["error"] == "SourceError"
        assert f"owner/model: {LONG_HEADER} is not in the local cache, and offline mode is on" in answer["message"]
        assert "Unset HF_HUB_OFFLINE" in answer["message"]
    assert loopback_hub.requests[before:] == []


def test_offline_without_a_list_of_files_warns(loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    loopback_hub.put("owner/model", hub_model)
    fetch = f"import huggingface_hub; [huggingface_hub.hf_hub_download('owner/model', name) for name in ('config.json', {LARGE!r})]"
    run_client(loopback_hub.environment(hub_home), fetch)
    body = "s = resolve('owner/model'); result = [[f.name, f.size, f.sha256] for f in s.files.values()]"
    files = run_client(loopback_hub.environment(hub_home, offline=True), body, expect_warning="taken for absent")
    stored = loopback_hub.repositories["owner/model"].files("main")
    assert files == [["config.json", stored["config.json"].size, None], [LARGE, stored[LARGE].size, stored[LARGE].sha256]]


@pytest.mark.parametrize("text", ["owner/model", "owner/model@v1", "owner/other@" + "0" * 40])
def test_offline_what_is_not_cached_is_refused(text: str, loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    loopback_hub.put("owner/model", hub_model)
    loopback_hub.put("owner/model", hub_model, revision="dev")
    run_client(loopback_hub.environment(hub_home), "hub.download(resolve('owner/model@dev'), ['config.json'])")
    before = len(loopback_hub.requests)
    answer = run_client(loopback_hub.environment(hub_home, offline=True), f"result = attempt(lambda: resolve({text!r}).commit)")
    assert answer["error"] == "SourceError"
    assert answer["message"].startswith(f"{text} is not in the local cache, and offline mode is on (HF_HUB_OFFLINE).")
    assert "hf download" in answer["message"]
    assert loopback_hub.requests[before:] == []


# The loopback Hub itself, by the one client that knows the real one


@pytest.mark.parametrize("way", ["LFS", "multipart", "Xet"])
def test_the_loopback_hub_takes_what_the_client_uploads(way: str, loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    loopback_hub.part_size = 2_000_000 if way == "multipart" else None
    body = (
        "from huggingface_hub import HfApi; api = HfApi(); api.create_repo('owner/model'); "
        f"commit = api.upload_folder(repo_id='owner/model', folder_path={str(hub_model)!r}); "
        f"result = str(hub.download(resolve('owner/model@' + commit.oid), {files_under(hub_model)!r}))"
    )
    environment = loopback_hub.environment(hub_home, token="owner-token", xet=way == "Xet")
    assert_same_files(Path(run_client(environment, body)), hub_model, files_under(hub_model))
    stored = loopback_hub.repositories["owner/model"].files("main")[LARGE]
    assert (stored.lfs, stored.xet_hash is not None) == (True, way == "Xet")
    puts = [request for request in loopback_hub.requests if request.method == "PUT" and stored.sha256 in request.path]
    assert len(puts) == {"LFS": 1, "multipart": 4, "Xet": 0}[way]
    assert [request for request in loopback_hub.requests if request.origin == "storage" and request.authorization] == []
