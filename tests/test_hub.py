"""Looking at the Hub: real HTTP between a client process and a Hub on loopback."""

from __future__ import annotations

import hashlib
import http.server
import json
import struct
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from hub_clients import LARGE, LONG_HEADER, LoopbackHub, client_command, files_under, names_a_server, run_client

from lox_merge.checkpoint.hub import HubReference, parse_hub_reference

pytest_plugins = ("hub_fixtures",)

REFUSED = "result = attempt(lambda: resolve({!r}).commit)"


def header_of(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + struct.unpack("<Q", data[:8])[0]]


def refusal(environment: dict[str, str], text: str) -> str:
    """The message that resolving `text` ends with."""
    answer = run_client(environment, REFUSED.format(text))
    assert answer.get("error") == "SourceError", answer
    assert "\n" not in answer["message"]
    return str(answer["message"])


# What counts as a Hub id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubReference("org/name", None)),
        ("org/name@v1.0", HubReference("org/name", "v1.0")),
        ("org/name@refs/pr/1", HubReference("org/name", "refs/pr/1")),
        ("Org_1/na-me.2@0123abc", HubReference("Org_1/na-me.2", "0123abc")),
    ],
)
def test_hub_ids_are_understood(text: str, expected: HubReference) -> None:
    assert parse_hub_reference(text) == expected
    assert str(expected) == text


NO_NAMES = ["", "name", "/org/name", "./org/name", "~/name", "org/name/", "a/b/c", "org/na me", "org/..", "org/a--b", "org/name.git"]
NO_REVISIONS = ["", "a b", "../../x", "a/../b", "/x", "x/", "-x", "a//b", ".x", "a/.x", "x.", "x.lock", "a^b", "a@{1}", "a\\b"]


@pytest.mark.parametrize("text", [*NO_NAMES, "https://org/name", "C:\\org/name", "@v1", *(f"org/name@{revision}" for revision in NO_REVISIONS)])
def test_other_texts_are_no_hub_ids(text: str) -> None:
    assert parse_hub_reference(text) is None


def test_importing_the_module_loads_neither_the_client_nor_torch(loopback_hub: LoopbackHub, hub_home: Path) -> None:
    body = "result = [name for name in ('huggingface_hub', 'torch', 'numpy') if name in sys.modules]"
    done = subprocess.run(client_command(body), env=loopback_hub.environment(hub_home), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["result"] == []


# Resolving


def test_every_kind_of_revision_resolves_to_its_commit(loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path, tmp_path: Path) -> None:
    old = loopback_hub.put("owner/model", hub_model)
    loopback_hub.tag("owner/model", "v1")
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "config.json").write_text("{}")
    new = loopback_hub.put("owner/model", changed)
    pull_request = loopback_hub.put("owner/model", changed, revision="refs/pr/1")
    body = f"result = [resolve('owner/model' + at).commit for at in ('', '@main', '@v1', '@refs/pr/1', '@{old}')]"
    assert run_client(loopback_hub.environment(hub_home), body) == [new, new, old, pull_request, old]


def test_a_snapshot_states_sizes_and_hashes_and_reads_no_content(loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    loopback_hub.put("owner/model", hub_model, private=True)
    body = "s = resolve('owner/model'); result = [repr(s), {f.name: [f.size, f.sha256] for f in s.files.values()}]"
    shown, files = run_client(loopback_hub.environment(hub_home, token="owner-token"), body)
    expected = {name: [(hub_model / name).stat().st_size, None] for name in files_under(hub_model)}
    for shard in (LARGE, LONG_HEADER):
        expected[shard][1] = hashlib.sha256((hub_model / shard).read_bytes()).hexdigest()  # type: ignore[call-overload]
    assert files == expected
    assert loopback_hub.content_requests() == []
    assert "owner-token" not in shown
    assert not names_a_server(shown)


REFUSALS: dict[str, tuple[str, str | None, list[str]]] = {
    "gated, no token": ("owner/gated", None, ["is gated", "Please log in", "Request access", "`hf auth login`"]),
    "gated, not on the list": ("owner/gated", "stranger-token", ["is gated", "not in the authorized list", "`hf auth login`"]),
    "private, no token": ("owner/private", None, ["not found", "is not logged in", "`hf auth login`", "HF_TOKEN"]),
    "private, somebody else": ("owner/private", "stranger-token", ["not found", "your token has no access", "`hf auth whoami`"]),
    "missing": ("owner/missing", "owner-token", ["not found", "Check the name"]),
    "token not accepted": ("owner/open", "unknown-token", ["does not accept your access token", "Invalid credentials", "`hf auth login`"]),
    "missing revision": ("owner/open@v9", None, ["not this revision", "Check the spelling"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_what_to_do_before_any_content_is_read(case: str, loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    loopback_hub.put("owner/gated", hub_model, gated=True)
    loopback_hub.put("owner/private", hub_model, private=True)
    loopback_hub.put("owner/open", hub_model)
    text, token, expected = REFUSALS[case]
    message = refusal(loopback_hub.environment(hub_home, token=token), text)
    for part in [text, *expected]:
        assert part in message
    assert "-token" not in message
    if case == "gated, not on the list":
        assert f"Request access at {loopback_hub.endpoint}/owner/gated, then" in message  # the page that the Hub itself names
        assert message.count("://") == 1
    else:
        assert not names_a_server(message)
    assert loopback_hub.content_requests() == []
    assert not hub_home.exists() or files_under(hub_home) == []


@pytest.mark.parametrize(("token", "settings"), [("stranger-token", {"readers": ["stranger"]}), ("read-token", {})])
def test_who_has_access_to_a_gated_model_gets_in(
    token: str, settings: dict[str, Any], loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path
) -> None:
    commit = loopback_hub.put("owner/gated", hub_model, gated=True, **settings)
    body = f"s = resolve('owner/gated'); result = [s.commit, hub.read_safetensors_header(s, {LARGE!r}).hex()]"
    answer = run_client(loopback_hub.environment(hub_home, token=token), body)
    assert answer == [commit, header_of(hub_model / LARGE).hex()]


def test_the_token_of_hf_auth_login_counts(loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    commit = loopback_hub.put("owner/private", hub_model, private=True)
    hub_home.mkdir()
    (hub_home / "token").write_text("owner-token")
    assert run_client(loopback_hub.environment(hub_home), REFUSED.format("owner/private")) == {"value": commit}


# A Hub in trouble, and something that is no Hub


def test_a_passing_failure_is_tried_again(loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    commit = loopback_hub.put("owner/model", hub_model)
    loopback_hub.fail("GET /api/models/owner/model", status=503)
    loopback_hub.fail("HEAD /owner/model/resolve/", cut_after=-1)
    assert run_client(loopback_hub.environment(hub_home), REFUSED.format("owner/model")) == {"value": commit}


def test_a_lasting_server_error_is_reported(loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    loopback_hub.put("owner/model", hub_model)
    loopback_hub.fail("/api/models/owner/model", times=99, status=503)
    message = refusal(loopback_hub.environment(hub_home), "owner/model")
    assert "owner/model" in message
    assert "trouble of its own (503)" in message
    assert "Try again" in message
    assert [request.status for request in loopback_hub.requests] == [503, 503, 503]


@pytest.mark.parametrize("headers", [{"Retry-After": "41"}, {"RateLimit": '"api";r=0;t=41'}])
def test_a_request_limit_names_the_seconds(headers: dict[str, str], loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    loopback_hub.put("owner/model", hub_model)
    loopback_hub.fail("/api/models/owner/model", times=99, status=429, headers=headers)
    message = refusal(loopback_hub.environment(hub_home), "owner/model")
    assert "Wait 41 seconds" in message
    assert "injected fault" in message
    assert len(loopback_hub.requests) == 1


def test_a_silent_hub_does_not_hang_the_client(loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    loopback_hub.put("owner/model", hub_model)
    loopback_hub.fail("HEAD /owner/model/resolve/", times=99, pause=5)
    message = refusal({**loopback_hub.environment(hub_home), "HF_HUB_DOWNLOAD_TIMEOUT": "1"}, "owner/model")
    assert "did not answer in time" in message


def test_no_network_points_to_the_cache(loopback_hub: LoopbackHub, hub_home: Path) -> None:
    loopback_hub.close()
    message = refusal(loopback_hub.environment(hub_home), "owner/model")
    assert "owner/model: the Hub cannot be reached (Connection refused)" in message
    assert "HF_HUB_OFFLINE=1" in message
    assert not names_a_server(message)


class LoginPage(http.server.BaseHTTPRequestHandler):
    """What a hotel's network answers."""

    def do_GET(self) -> None:
        body = b"<html>Please pay</html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


def test_an_answer_that_is_not_the_hubs_is_reported(loopback_hub: LoopbackHub, hub_home: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), LoginPage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {**loopback_hub.environment(hub_home), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        message = refusal(environment, "owner/model")
        server.shutdown()
    assert "not an answer of the Hub" in message
    assert "HF_ENDPOINT" in message


# Headers


@pytest.mark.parametrize("xet", [False, True], ids=["LFS", "Xet"])
def test_a_header_costs_a_few_kilobytes_of_a_shard(xet: bool, loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    loopback_hub.put("owner/model", hub_model, private=True, xet=xet)
    body = f"s = resolve('owner/model'); result = [hub.read_safetensors_header(s, n).hex() for n in {[LARGE, LONG_HEADER]}]"
    headers = run_client(loopback_hub.environment(hub_home, token="owner-token", xet=xet), body)
    assert headers == [header_of(hub_model / name).hex() for name in (LARGE, LONG_HEADER)]
    long = len(header_of(hub_model / LONG_HEADER))
    reads = [request for request in loopback_hub.requests if request.origin == "storage"]
    # One read for a header that fits the first one, a second for the long one.
    assert [request.sent for request in reads] == [32768, 32768, long]
    assert long > 32768
    assert [request.authorization for request in reads] == [None] * 3
    assert {request.authorization for request in loopback_hub.requests if request.origin == "hub"} == {"Bearer owner-token"}


def test_a_server_that_ignores_ranges_is_read_no_further_than_needed(loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    loopback_hub.put("owner/model", hub_model)
    loopback_hub.fail("GET /lfs/", times=99, ignore_range=True, pause=0.02)
    body = f"s = resolve('owner/model'); result = [hub.read_safetensors_header(s, n).hex() for n in {[LARGE, LONG_HEADER]}]"
    headers = run_client(loopback_hub.environment(hub_home), body)
    assert headers == [header_of(hub_model / name).hex() for name in (LARGE, LONG_HEADER)]
    assert sum(request.sent for request in loopback_hub.requests) < (hub_model / LARGE).stat().st_size / 2


DAMAGED = {
    "claims more than the file": (struct.pack("<Q", 5000) + b"{}" * 50, "claims 5,000 bytes and the file has 108"),
    "claims more than the format allows": (struct.pack("<Q", 2**40) + bytes(100), "claims 1,099,511,627,776 bytes"),
    "shorter than a length": (b"abc", "too short"),
    "empty": (b"", "too short"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_headers_are_refused(case: str, loopback_hub: LoopbackHub, hub_home: Path, tmp_path: Path) -> None:
    data, expected = DAMAGED[case]
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text("{}")
    loopback_hub.put("owner/damaged", folder)
    body = "s = resolve('owner/damaged'); result = attempt(lambda: hub.read_safetensors_header(s, 'model.safetensors').hex())"
    answer = run_client(loopback_hub.environment(hub_home), body)
    assert answer["error"] == "CheckpointFormatError"
    assert "owner/damaged/model.safetensors" in answer["message"]
    assert expected in answer["message"]


def test_a_name_that_the_commit_lacks_is_refused_without_asking(loopback_hub: LoopbackHub, hub_model: Path, hub_home: Path) -> None:
    commit = loopback_hub.put("owner/model", hub_model)
    header = "lambda: hub.read_safetensors_header(s, 'no.safetensors')"
    files = "lambda: hub.download(s, ['config.json', 'no.safetensors'])"
    body = f"s = resolve('owner/model'); result = [attempt({header}), attempt({files})]"
    for answer in run_client(loopback_hub.environment(hub_home), body):
        assert answer["message"].startswith(f"owner/model has no file no.safetensors at commit {commit[:12]}")
    assert loopback_hub.content_requests() == []
