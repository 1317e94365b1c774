"""Pull requests: anybody may open one on a repository that they can see, and write to its branch refs/pr/N."""

from __future__ import annotations

from typing import Any

from hub_server.http_handler import REPOSITORY, Handler, route
from hub_server.repositories import HubError, PullRequest, Repository

_DISCUSSIONS = f"/api/models/{REPOSITORY}/discussions"


@route("GET", _DISCUSSIONS)
def list_discussions(request: Handler, name: str) -> None:
    repository = request.repository(name)
    author = request.query.get("author")
    rows = [_row(repository, one) for one in repository.pull_requests if author in (None, one.author)]
    request.json({"discussions": rows, "count": len(rows), "start": 0})


@route("POST", _DISCUSSIONS)
def open_discussion(request: Handler, name: str) -> None:
    settings = request.body_json()
    user, repository = request.user("write"), request.repository(name)
    if not settings.get("pullRequest"):
        raise HubError(400, "only pull requests are imitated here")
    with request.hub.lock:
        number = len(repository.pull_requests) + 1
        repository.pull_requests.append(PullRequest(number, settings["title"], str(user)))
        repository.branches[f"refs/pr/{number}"] = repository.resolve("main")
    request.json({"num": number})


@route("GET", rf"{_DISCUSSIONS}/(?P<number>\d+)")
def discussion_details(request: Handler, name: str, number: str) -> None:
    repository = request.repository(name)
    one = next((one for one in repository.pull_requests if one.number == int(number)), None)
    if one is None:
        raise HubError(404, "Discussion not found")
    changes = {"base": "refs/heads/main", "mergeCommitId": None}
    request.json({**_row(repository, one), "events": [], "filesWithConflicts": [], "changes": changes, "diff": ""})


def _row(repository: Repository, one: PullRequest) -> dict[str, Any]:
    return {
        "title": one.title,
        "num": one.number,
        "author": {"name": one.author},
        "createdAt": "2026-01-01T00:00:00.000Z",
        "status": one.status,
        "repo": {"name": repository.name, "type": "model"},
        "isPullRequest": True,
    }
