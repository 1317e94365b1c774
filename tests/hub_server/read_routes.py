"""Answers to readers: what is in a repository, and its files."""

from __future__ import annotations

import json
import re
import time
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hub_server.http_handler import REPOSITORY, Handler, route
from hub_server.repositories import HubError, StoredFile

_MODEL = f"/api/models/{REPOSITORY}"


@route("GET", "/api/whoami-v2")
def who_am_i(request: Handler) -> None:
    name = request.user("read")
    token = request.headers["authorization"].removeprefix("Bearer ")
    role = request.hub.tokens[token][1]
    organizations = [{"name": organization, "roleInOrg": "write"} for organization in sorted(request.hub.organizations)]
    access: dict[str, Any] = {"role": role}
    if token in request.hub.fine_grained:
        access |= {"role": "fineGrained", "fineGrained": request.hub.fine_grained[token]}
    request.json({"type": "user", "name": name, "orgs": organizations, "auth": {"type": "access_token", "accessToken": access}})


@route("GET", f"{_MODEL}/auth-check")
def authorization_check(request: Handler, name: str) -> None:
    request.contents(name)
    request.json({})


@route("GET", f"{_MODEL}/auth-check/write")
def write_check(request: Handler, name: str) -> None:
    request.repository(name, "write")
    request.json({})


@route("GET", _MODEL)
@route("GET", f"{_MODEL}/revision/(?P<revision>[^/]+)")
def model_info(request: Handler, name: str, revision: str = "main") -> None:
    repository = request.repository(name)
    commit = repository.resolve(revision)
    with_sizes = request.query.get("blobs", "").lower() in ("1", "true")
    siblings = [_sibling(path, file, with_sizes) for path, file in sorted(repository.commits[commit].files.items())]
    identity = {"_id": "0" * 24, "id": name, "modelId": name, "sha": commit, "tags": [], "downloads": 0, "likes": 0}
    access = {"private": repository.private, "gated": "manual" if repository.gated else False}
    request.json({**identity, **access, "siblings": siblings})


def _sibling(path: str, file: StoredFile, with_sizes: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path}
    if with_sizes:
        sibling |= {"size": file.size, "blobId": file.git_oid}
        if file.lfs:
            sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
    return sibling


@route("GET", f"{_MODEL}/refs")
def references(request: Handler, name: str) -> None:
    repository = request.repository(name)

    def rows(kind: str, targets: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit} for name, commit in targets.items()]

    request.json({"branches": rows("heads", repository.branches), "tags": rows("tags", repository.tags), "converts": []})


@route("GET", f"{_MODEL}/tree/(?P<revision>[^/]+)/?(?P<folder>.*)")
def tree(request: Handler, name: str, revision: str, folder: str) -> None:
    files = request.repository(name).files(revision)
    prefix = f"{folder.strip('/')}/" if folder else ""
    rows = [_tree_row(path, file) for path, file in sorted(files.items()) if path.startswith(prefix)]
    if request.query.get("recursive", "").lower() not in ("1", "true"):
        rows = [row for row in rows if "/" not in row["path"].removeprefix(prefix)]
    first, limit = int(request.query.get("cursor", 0)), int(request.query.get("limit", 1000))
    headers = {}
    if first + limit < len(rows):
        page = f"{request.hub.endpoint}{urlsplit(request.path).path}?recursive=true&limit={limit}&cursor={first + limit}"
        headers["Link"] = f'<{page}>; rel="next"'
    request.json(rows[first : first + limit], headers=headers)


@route("POST", f"{_MODEL}/paths-info/(?P<revision>[^/]+)")
def paths_information(request: Handler, name: str, revision: str) -> None:
    body = request.body()
    if "json" in request.headers.get("content-type", ""):
        wanted = json.loads(body)["paths"]
    else:
        wanted = parse_qs(body.decode()).get("paths", [])
    files = request.repository(name).files(revision)
    request.json([_tree_row(path, files[path]) for path in ([wanted] if isinstance(wanted, str) else wanted) if path in files])


def _tree_row(path: str, file: StoredFile) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": file.git_oid}
    if file.lfs:
        row["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    if file.xet_hash:
        row["xetHash"] = file.xet_hash
    return row


@route("GET", f"{_MODEL}/xet-(?P<mode>read|write)-token/(?P<revision>[^/]+)")
def xet_token(request: Handler, name: str, mode: str, revision: str) -> None:
    if mode == "write":
        request.branch_to_write(name, revision)
    else:
        request.contents(name)
    if request.hub.xet is None:
        raise HubError(404, "Xet is not enabled for this repository")
    url, token, expires = request.hub.xet.url, "xet-test", int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    request.json({"casUrl": url, "exp": expires, "accessToken": token}, headers=headers)


@route("GET", rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(request: Handler, name: str, revision: str, path: str) -> None:
    """A small file itself, or the way to a large one: a redirect to the storage origin."""
    repository = request.contents(name)
    commit = repository.resolve(revision)
    headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    file = repository.commits[commit].files.get(path)
    if file is None:
        raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit})
    if not file.lfs:
        request.send_file(request.hub.blobs.path(file.sha256), {**headers, "ETag": f'"{file.git_oid}"'})
        return
    if file.xet_hash:
        headers["X-Xet-Hash"] = file.xet_hash
        headers["X-Xet-Refresh-Route"] = f"{request.hub.endpoint}/api/models/{name}/xet-read-token/{commit}"
    headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    request.reply(302, {**headers, "Location": f"{request.hub.storage}/lfs/{file.sha256}?signature=1"})


@route("GET", "/lfs/(?P<sha256>[0-9a-f]{64})", origin="storage")
def stored_object(request: Handler, sha256: str) -> None:
    if not request.hub.blobs.holds(sha256) or not re.search("signature=1", request.path):
        raise HubError(403, "Signature does not match")
    request.send_file(request.hub.blobs.path(sha256), {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})
