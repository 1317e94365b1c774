"""One finished output and a Hub to publish it to, and what tests of publishing look at."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_clients import TOKENS, LoopbackHub, files_under, names_a_server
from hub_server import Request
from publishers import Done, Publisher


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """base, aligned, and the finished output 'out'."""
    from tiny_models import make_pair

    from lox_merge import Recipe, harden

    folder = tmp_path_factory.mktemp("publish")
    base, aligned = make_pair(folder, "llama", aligned_shards=3)
    (aligned / "LICENSE").write_text("Terms.\n")
    harden(base, aligned, folder / "out", recipe=Recipe(rank=4))
    return base, aligned, folder / "out"


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LoopbackHub, Publisher]]:
    tokens = {**TOKENS, "fine-token": ("owner", "write")}
    with (
        LoopbackHub(tmp_path_factory.mktemp("hub"), tokens, organizations=["org"]) as hub,
        Publisher(hub, tmp_path_factory.mktemp("home")) as publisher,
    ):
        yield hub, publisher


@pytest.fixture
def hub(served: tuple[LoopbackHub, Publisher]) -> Iterator[LoopbackHub]:
    hub = served[0]
    yield hub
    left, hub.part_size = hub.faults.left(), None
    hub.faults.clear()
    assert left == [], "a fault that was ordered did not happen"


@pytest.fixture
def publisher(served: tuple[LoopbackHub, Publisher], hub: LoopbackHub) -> Publisher:
    return served[1]


@pytest.fixture
def out(made: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made[2], tmp_path / "out")


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """A name of its own for every test."""
    return f"owner/test-{zlib.crc32(request.node.name.encode()):08x}"


def since(hub: LoopbackHub, start: int) -> list[Request]:
    return hub.requests[start:]


def sent_bytes(requests: list[Request]) -> int:
    """Bytes of file content that a client sent: to the storage, and inside commits."""
    return sum(request.received for request in requests if request.method == "PUT" or "/commit/" in request.path)


def stored(hub: LoopbackHub, repo: str, revision: str = "main") -> dict[str, bytes]:
    files = hub.repositories[repo].files(revision)
    return {name: hub.blobs.path(file.sha256).read_bytes() for name, file in files.items() if name != ".gitattributes"}


def assert_published(hub: LoopbackHub, repo: str, out: Path, revision: str = "main") -> None:
    """The branch holds the output's files, byte for byte, and the card."""
    there = stored(hub, repo, revision)
    assert sorted(there) == sorted({*files_under(out), "README.md"})
    for name in files_under(out):
        assert there[name] == (out / name).read_bytes(), name


def refused(done: Done, *words: str, code: int = 2) -> None:
    assert done.returncode == code, (done.returncode, done.stderr)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning:")]
    assert lines and lines[0].startswith("error: ")
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr and "-token" not in done.stderr and not names_a_server(done.stderr)
