"""Clients of a loopback Hub, which talk to it and to nothing else, each in a process of its own.

huggingface_hub reads its environment variables when it is imported, so only a process that has not imported it sees what a user would
see.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forked_cli import run_forked
from hub_server import Hub, Request

TOKENS = {"owner-token": ("owner", "write"), "read-token": ("owner", "read"), "stranger-token": ("stranger", "write")}
# Shards of the fixture `hub_model`.
LARGE, LONG_HEADER = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
_FOREIGN = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")

_CLIENT = """
import json, pickle, sys, warnings
from pathlib import Path
from lox_merge.checkpoint import hub
from lox_merge.errors import LoxMergeError, LoxMergeWarning

def attempt(action):
    # The value of the action, or what its error says to the user.
    try:
        return {"value": action()}
    except LoxMergeError as error:
        return {"error": type(error).__name__, "message": str(error)}

def resolve(text):
    return hub.resolve(hub.parse_hub_reference(text))

warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    result = None
    exec(sys.argv[1])
print(json.dumps({"result": result, "warnings": [str(warning.message) for warning in caught if issubclass(warning.category, LoxMergeWarning)]}))
"""


class LoopbackHub(Hub):
    """A Hub with a few users: "owner" owns the namespace "owner", "stranger" another one."""

    def environment(self, home: Path, *, token: str | None = None, xet: bool = False, offline: bool = False) -> dict[str, str]:
        """Environment for a subprocess. home: becomes HF_HOME. Whoever runs the tests stays logged in, but not in here."""
        kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(_FOREIGN)}
        settings = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": str(int(not xet)),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return {**kept, **settings, **({"HF_TOKEN": token} if token else {})}

    def content_requests(self) -> list[Request]:
        """Requests that read file contents: from the storage origin, or small files from the Hub itself."""
        return [request for request in self.requests if request.method == "GET" and (request.origin == "storage" or "/resolve/" in request.path)]


def client_command(body: str) -> list[str]:
    """Command of a client that runs `body` with `hub`, `resolve(text)` and `attempt(action)`; `body` assigns `result`."""
    return [sys.executable, "-c", _CLIENT, body]


def run_client(environment: Mapping[str, str], body: str, *, expect_warning: str | None = None) -> Any:
    """What the client assigned to `result`. A LoxMergeWarning fails the test, unless one with this text is expected."""
    process = run_forked([body], environment, program=_CLIENT, timeout=100)
    assert process.returncode == 0, process.stderr
    answer = json.loads(process.stdout.splitlines()[-1])
    if expect_warning is None:
        assert answer["warnings"] == [], answer["warnings"]
    else:
        assert any(expect_warning in warning for warning in answer["warnings"]), answer["warnings"]
    return answer["result"]


def files_under(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def names_a_server(text: str) -> bool:
    """True when a message gives away where the Hub or its storage is."""
    return any(host in text for host in ("127.0.0.1", "localhost"))
