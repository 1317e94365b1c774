"""HTTP plumbing: reading bodies, answering, breaking connections, and who is asking."""

from __future__ import annotations

import json
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_server.faults import Fault, Request
from hub_server.repositories import HubError, Repository

if TYPE_CHECKING:
    from hub_server.hub import Hub

PIECE = 65536
REPOSITORY = r"(?P<name>[\w.-]+/[\w.-]+)"


@dataclass(frozen=True)
class Route:
    method: str
    pattern: re.Pattern[str]
    answer: Callable[..., None]
    origin: str


ROUTES: list[Route] = []


def route(method: str, pattern: str, origin: str = "hub") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function as the answer to `method` on paths that match `pattern`; its groups become arguments."""

    def register(answer: Callable[..., None]) -> Callable[..., None]:
        ROUTES.append(Route(method, re.compile(pattern), answer, origin))
        return answer

    return register


class Handler(BaseHTTPRequestHandler):
    """One connection. `query`, `fault`, and the counts belong to the request being served."""

    protocol_version = "HTTP/1.1"
    # Head and body are two writes; with Nagle's algorithm every answer would wait 40 ms for an acknowledgement.
    disable_nagle_algorithm = True
    hub: Hub
    origin: str
    query: dict[str, str]
    fault: Fault | None
    status: int
    sent: int
    received: int

    def log_message(self, *arguments: Any) -> None:
        """Tests read `Hub.requests` instead."""

    def dispatch(self) -> None:
        self.hub.log.begin()
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.status = self.sent = self.received = 0
        self.fault = self.hub.faults.take(f"{self.command} {unquote(url.path)}")
        if self.fault and self.fault.pause:
            time.sleep(self.fault.pause)
        if self.fault and self.fault.meanwhile:
            self.fault.meanwhile()
        try:
            try:
                self._answer(url.path)
            except HubError as error:
                self._refuse(error)
        except ConnectionError:
            self.status = -1
            self.close_connection = True
        finally:
            self._log(unquote(url.path))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = dispatch

    def _answer(self, path: str) -> None:
        if self.fault and self.fault.status:
            self.drain()
            raise HubError(self.fault.status, self.fault.message, headers=self.fault.headers)
        method = "GET" if self.command == "HEAD" else self.command
        for candidate in ROUTES:
            # Matched before unquoting: a revision such as refs/pr/1 arrives as one quoted segment.
            match = candidate.pattern.fullmatch(path)
            if match and candidate.method == method and candidate.origin == self.origin:
                candidate.answer(self, **{key: unquote(value or "") for key, value in match.groupdict().items()})
                return
        self.drain()
        raise HubError(404, f"no route for {self.command} {path}")

    def _refuse(self, error: HubError) -> None:
        headers = {"X-Error-Message": error.message, **error.headers, "Connection": "close"}
        if error.code:
            headers["X-Error-Code"] = error.code
        self.close_connection = True  # the body may not have been read
        self.json({"error": error.message}, error.status, headers)

    def _log(self, path: str) -> None:
        self.hub.log.end(
            Request(
                method=self.command,
                path=path,
                origin=self.origin,
                status=self.status,
                sent=self.sent,
                received=self.received,
                authorization=self.headers.get("authorization"),
                range=self.headers.get("range"),
                query=self.query,
            )
        )

    # Request bodies

    def pieces(self) -> Iterator[bytes]:
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            yield from self._take(int(self.headers.get("content-length") or 0))
            return
        while length := int(self.rfile.readline().split(b";")[0], 16):
            yield from self._take(length)
            self.rfile.readline()
        self.rfile.readline()

    def _take(self, count: int) -> Iterator[bytes]:
        while count:
            piece = self.rfile.read(min(count, PIECE))
            if not piece:
                raise ConnectionError("the client went away")
            count -= len(piece)
            self.received += len(piece)
            yield piece
            self._cut_if_due(self.received)

    def body(self) -> bytes:
        return b"".join(self.pieces())

    def drain(self) -> None:
        for _ in self.pieces():
            pass

    def body_json(self) -> Any:
        return json.loads(self.body() or b"{}")

    # Answers

    def json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.reply(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())

    def reply(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        if self.fault and self.fault.cut_after == -1:
            self._cut()
        self._head(status, {"Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, path: Path, headers: Mapping[str, str]) -> None:
        """The file, or the part of it that a Range header asks for."""
        size = path.stat().st_size
        first, last, status = 0, size - 1, 200
        extra = {}
        asked = "" if self.fault and self.fault.ignore_range else self.headers.get("range", "")
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", asked):
            first, last, status = int(match[1]), min(int(match[2] or size - 1), size - 1), 206
            if first >= size:
                raise HubError(416, "Requested range is not satisfiable", headers={"Content-Range": f"bytes */{size}"})
            extra["Content-Range"] = f"bytes {first}-{last}/{size}"
        length = str(last - first + 1)
        self._head(status, {"Content-Type": "application/octet-stream", "Content-Length": length, **extra, **headers})
        if self.command == "HEAD":
            return
        with path.open("rb") as file:
            file.seek(first)
            while piece := file.read(min(PIECE, last + 1 - file.tell())):
                self.wfile.write(piece)
                self.sent += len(piece)
                self._cut_if_due(self.sent)
                if self.fault and self.fault.pause:
                    time.sleep(self.fault.pause)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def _cut_if_due(self, count: int) -> None:
        if self.fault and self.fault.cut_after is not None and 0 <= self.fault.cut_after <= count:
            self._cut()

    def _cut(self) -> None:
        self.wfile.flush()
        if self.fault and self.fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        raise ConnectionError("cut")

    # Who is asking, and what they may see

    def user(self, role: str | None = None, namespace: str | None = None) -> str | None:
        """Name of the user, None without a token. role: "read" asks for any token, "write" for one that may write."""
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        if not token:
            if role:
                raise HubError(401, "Invalid username or password.")
            return None
        name, granted = self.hub.tokens[token]
        if role == "write" and granted == "read":
            raise HubError(403, "You have read access but not the required permissions for this operation")
        if namespace and not self._owns(name, namespace):
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        return name

    def repository(self, name: str, role: str | None = None) -> Repository:
        """The repository, as far as the user may see it: the Hub hides private ones behind "not found"."""
        user = self.user(role)
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._reads(user, repository)):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if role == "write" and not self._owns(user, repository.namespace):
            raise HubError(403, "You don't have write access to this repo")
        return repository

    def branch_to_write(self, name: str, revision: str) -> Repository:
        """The repository, if the user may write to this branch: everybody may write to the pull requests that are theirs."""
        number = revision.removeprefix("refs/pr/")
        mine = [request.number for request in self.repository(name).pull_requests if request.author == self.user("write")]
        return self.repository(name) if number.isdigit() and int(number) in mine else self.repository(name, "write")

    def contents(self, name: str) -> Repository:
        """The repository, if the user may also read its files: a gated one shows its listing to everybody, its files not."""
        repository = self.repository(name)
        user = self.user()
        if repository.gated and not self._reads(user, repository):
            restricted = f"Access to model {name} is restricted"
            if user is None:
                message = f"{restricted}. You must have access to it and be authenticated to access it. Please log in."
                raise HubError(401, message, "GatedRepo")
            page = f"{self.hub.endpoint}/{name}"
            raise HubError(403, f"{restricted} and you are not in the authorized list. Visit {page} to ask for access.", "GatedRepo")
        return repository

    def _owns(self, user: str | None, namespace: str) -> bool:
        return user is not None and (namespace == user or namespace in self.hub.organizations)

    def _reads(self, user: str | None, repository: Repository) -> bool:
        return self._owns(user, repository.namespace) or user in repository.readers
