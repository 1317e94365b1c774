"""The server: state, faults, log, and what a test puts into it directly."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from hub_server import discussion_routes, read_routes, write_routes  # noqa: F401  importing them registers the routes
from hub_server.faults import Fault, FaultPlan, Request, RequestLog
from hub_server.http_handler import Handler
from hub_server.repositories import LARGEST_REGULAR_FILE, LFS_SUFFIXES, BlobStore, Repository, StoredFile, large_file, regular_file
from hub_server.xet_storage import XetStorage


class Hub:
    """A Hub on two loopback ports: `endpoint` for the API and small files, `storage` for large ones.

    tokens: {token: (user, "read" or "write")}. organizations: namespaces that every user may write to. part_size: bytes of one
    part of a multipart upload; None accepts whole files only. Stop it with `close`, or use it in a `with` statement.
    """

    def __init__(
        self,
        folder: Path,
        tokens: Mapping[str, tuple[str, str]] | None = None,
        *,
        organizations: Iterable[str] = (),
        xet: bool = True,
        part_size: int | None = None,
    ) -> None:
        self.folder = folder
        self.tokens = dict(tokens or {})
        self.organizations = frozenset(organizations)
        self.part_size = part_size
        # Permissions of fine-grained tokens, as the Hub tells them: {"global": […], "scoped": [{"entity": {"name": …}, "permissions": […]}]}.
        self.fine_grained: dict[str, dict[str, Any]] = {}
        self.blobs = BlobStore(folder / "blobs")
        self.xet = XetStorage(folder / "cas") if xet else None
        self.repositories: dict[str, Repository] = {}
        self.log = RequestLog()
        self.faults = FaultPlan()
        self.lock = threading.RLock()
        self._servers = {origin: self._serve(origin) for origin in ("hub", "storage")}
        self.endpoint = f"http://127.0.0.1:{self._servers['hub'].server_port}"
        # Another host name, as on the real Hub: some versions of the client tell origins apart by the host alone.
        self.storage = f"http://localhost:{self._servers['storage'].server_port}"

    def _serve(self, origin: str) -> ThreadingHTTPServer:
        handler = type(f"{origin.title()}Handler", (Handler,), {"hub": self, "origin": origin})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        # The default poll of half a second would be most of the time of a short test.
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    @property
    def requests(self) -> list[Request]:
        """All requests so far, once those under way have ended: a client can be gone before its last one is written down."""
        return self.log.settled()

    def new_repository(self, name: str, **settings: bool | frozenset[str]) -> Repository:
        repository = self.repositories[name] = Repository(name, **settings)  # type: ignore[arg-type]
        return repository

    def put(
        self,
        name: str,
        folder: Path,
        *,
        revision: str = "main",
        gated: bool = False,
        private: bool = False,
        readers: Iterable[str] = (),
        xet: bool = False,
    ) -> str:
        """Commits the files of `folder` as the whole content of a branch and returns the commit, without any HTTP.

        xet: keep large files in Xet storage too. gated, private, readers: as in Repository; set anew by every call.
        """
        repository = self.repositories.get(name) or self.new_repository(name)
        repository.gated, repository.private, repository.readers = gated, private, frozenset(readers)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): self._stored(path, xet) for path in paths}
        return repository.commit(revision, files, f"put {folder.name}")

    def _stored(self, path: Path, xet: bool) -> StoredFile:
        size = path.stat().st_size
        if size <= LARGEST_REGULAR_FILE and not path.name.endswith(LFS_SUFFIXES):
            return regular_file(self.blobs, path.read_bytes())
        if xet and self.xet is None:
            raise ValueError("this Hub was started without Xet storage")
        return large_file(self.blobs.put_file(path), size, self.xet.put(path) if xet and self.xet else None)

    def tag(self, name: str, tag: str, revision: str = "main") -> None:
        repository = self.repositories[name]
        repository.tags[tag] = repository.resolve(revision)

    def fail(
        self,
        pattern: str,
        times: int = 1,
        *,
        status: int | None = None,
        cut_after: int | None = None,
        reset: bool = True,
        pause: float = 0.0,
        ignore_range: bool = False,
        headers: Mapping[str, str] | None = None,
        message: str = "injected fault",
        meanwhile: Callable[[], object] | None = None,
    ) -> None:
        """Orders a Fault for the next `times` requests whose "METHOD /path" matches `pattern`."""
        self.faults.add(Fault(re.compile(pattern), times, status, cut_after, reset, pause, ignore_range, headers or {}, message, meanwhile))
