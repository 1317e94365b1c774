"""May this token publish there? Asked before anything is computed, so that hours of work do not end at a closed door."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from lox_merge.checkpoint.hub_failures import status_of
from lox_merge.checkpoint.hub_reference import parse_hub_reference
from lox_merge.errors import LoxMergeWarning, RequestError
from lox_merge.jobs.output_folder import MANIFEST
from lox_merge.publish.failures import explained_push, insistently, no_token

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".npz", ".tflite")
_MAIN = "main"
_PULL_REQUESTS = "refs/pr/"
# A commit, git's own name for one, and references that nobody writes to.
_NO_BRANCH = re.compile(r"[0-9a-f]{40}|HEAD|refs/(?!pr/[0-9]+$).*")


@dataclass(frozen=True)
class Target:
    """Where to publish. branch: as on the Hub (refs/pr/N too). exists, branch_exists: when it was looked at. private: it is, or will be."""

    repo: str
    user: str
    branch: str
    exists: bool
    branch_exists: bool
    private: bool
    pull_request: bool


def hub_api() -> Any:
    """The client with the token in use, which it would not send by itself where implicit tokens are switched off."""
    from huggingface_hub import HfApi, get_token

    return HfApi(token=get_token())


def check_can_push(repo: str, *, public: bool = False, revision: str | None = None, pull_request: bool = False) -> Target:
    """Looks at the token and at the repository; changes nothing. Raises RequestError where publishing would be refused, and where it
    would mix two models or change who sees them; PublishError where the Hub does not answer.
    """
    branch = _check_names(repo, revision, pull_request)
    from huggingface_hub import get_token, is_offline_mode

    if is_offline_mode():
        raise RequestError(f"{repo}: nothing can be published in offline mode. Unset HF_HUB_OFFLINE.")
    if get_token() is None:
        raise no_token()
    api = hub_api()
    with explained_push(repo):
        account = insistently(api.whoami)
        user = str(account["name"])
        _check_token(account, repo, pull_request)
        if not pull_request:
            _check_namespace(account, repo)
        information = _information(api, repo)
        if information is None:
            if pull_request or branch.startswith(_PULL_REQUESTS):
                raise RequestError(f"{repo} was not found on the Hub, so there is nothing to open a pull request for. Check the name.")
            return Target(repo, user, branch, False, branch == _MAIN, not public, False)
        if not pull_request:
            check_write(repo)
        _check_visibility(repo, bool(information.private), public)
        on_branch = information if branch == _MAIN else _on_branch(api, repo, branch)
        # A branch whose head is still main's was made a moment ago: by a push that goes on with this one.
        of_its_own = on_branch is not None and (branch == _MAIN or on_branch.sha != information.sha)
        if of_its_own and not pull_request and not branch.startswith(_PULL_REQUESTS):
            _check_free(repo, branch, [sibling.rfilename for sibling in on_branch.siblings or []])
    return Target(repo, user, branch, True, on_branch is not None, bool(information.private), pull_request)


def check_repository_name(repo: str) -> None:
    """Raises RequestError for what is no NAMESPACE/NAME."""
    reference = parse_hub_reference(repo)
    if reference is None or reference.revision is not None:
        hint = " Name a branch with --revision." if reference is not None else ""
        raise RequestError(f"{repo!r} is no repository of the Hub: give NAMESPACE/NAME, such as your-name/model-lox.{hint}")


def _check_names(repo: str, revision: str | None, pull_request: bool) -> str:
    """The branch to write to. Raises RequestError for names that cannot be."""
    check_repository_name(repo)
    if revision is None:
        return _MAIN
    if pull_request:
        raise RequestError("--pull-request opens a new one against the main branch; to go on with an old one, give --revision refs/pr/N alone.")
    if parse_hub_reference(f"{repo}@{revision}") is None or _NO_BRANCH.fullmatch(revision):
        raise RequestError(f"--revision {revision!r}: give the name of a branch (it is made if it is not there), or refs/pr/N.")
    return revision


def _check_token(account: Mapping[str, Any], repo: str, pull_request: bool) -> None:
    """Refuses read-only tokens. What the Hub does not tell about a token is left to its own checks."""
    token = (account.get("auth") or {}).get("accessToken") or {}
    remedy = "Use one with write access (`hf auth login`, HF_TOKEN)."
    if token.get("role") == "read":
        raise RequestError(f"{repo}: the access token in use may only read. {remedy}")
    granted = token.get("fineGrained")
    if token.get("role") != "fineGrained" or not granted:
        return
    namespace, needed = repo.split("/")[0], {"repo.write"} | ({"discussion.write"} if pull_request else set())
    allowed = set(granted.get("global") or [])
    for scope in granted.get("scoped") or []:
        if (scope.get("entity") or {}).get("name") in (namespace, repo):
            allowed |= set(scope.get("permissions") or [])
    if not allowed & needed:
        raise RequestError(
            f"{repo}: the fine-grained access token in use may not write there. Grant it write access to {namespace} or {repo}. {remedy}"
        )


def _check_namespace(account: Mapping[str, Any], repo: str) -> None:
    namespace = repo.split("/")[0]
    roles = {str(organization["name"]): organization.get("roleInOrg") for organization in account.get("orgs") or []}
    if namespace != account["name"] and namespace not in roles:
        own = ", ".join([str(account["name"]), *roles])
        raise RequestError(
            f"{repo}: {namespace} is somebody else. The token in use is {account['name']}'s, who can publish as {own}. "
            "Choose another name, or offer the change with --pull-request."
        )
    if roles.get(namespace) == "read":
        raise RequestError(f"{repo}: {account['name']} may only read in the organization {namespace}. Ask its admins for write access.")


def check_write(repo: str) -> None:
    """What the Hub says itself, resource groups and the like included. Raises the library's error for a refusal."""
    insistently(lambda: _ask(f"/api/models/{repo}/auth-check/write"))


def check_xet(repo: str, revision: str) -> None:
    """Asks for the token that Xet uploads need. hf_xet would repeat a refused request for minutes and then call it a broken
    connection. Raises the library's error for a refusal.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_DISABLE_XET or importlib.util.find_spec("hf_xet") is None:
        return
    try:
        insistently(lambda: _ask(f"/api/models/{repo}/xet-write-token/{quote(revision, safe='')}"))
    except HfHubHTTPError as error:
        if status_of(error) != 404:  # a server without Xet: what then is left to the library
            raise


def _ask(path: str) -> None:
    from huggingface_hub import constants, get_session, get_token, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers

    hf_raise_for_status(get_session().get(constants.ENDPOINT + path, headers=build_hf_headers(token=get_token())))


def _information(api: Any, repo: str, revision: str | None = None) -> Any:
    """The Hub's answer about repository and revision; None where there is none of that name."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return insistently(lambda: api.model_info(repo, revision=revision))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def _on_branch(api: Any, repo: str, branch: str) -> Any:
    """The same about a branch, or the reference of a pull request. Raises RequestError for what cannot be written to, or made a branch."""
    pull_request = branch.startswith(_PULL_REQUESTS)
    if not pull_request and branch not in {reference.name for reference in insistently(lambda: api.list_repo_refs(repo)).branches}:
        if _information(api, repo, branch) is not None:
            raise RequestError(f"--revision {branch!r} is a tag or a commit of {repo}, which stays. Give the name of a branch, old or new.")
        return None
    found = _information(api, repo, branch)
    if found is None and pull_request:
        raise RequestError(f"{repo} has no {branch}. Check the number of the pull request, or open one with --pull-request.")
    return found


def _check_visibility(repo: str, private: bool, public: bool) -> None:
    if private and public:
        raise RequestError(
            f"{repo} exists and is private, and its visibility is not changed from here. Leave --public out, "
            "or make it public yourself in its settings on the Hub when you mean to."
        )
    if not private and not public:
        warnings.warn(f"{repo} exists and is public: what is pushed there can be seen by everybody at once.", LoxMergeWarning, stacklevel=3)


def _check_free(repo: str, branch: str, names: list[str]) -> None:
    """Raises RequestError where the branch holds a model that is not lox-merge's."""
    weights = [name for name in names if PurePosixPath(name).suffix in WEIGHTS]
    if weights and MANIFEST not in names:
        where = repo if branch == _MAIN else f"{repo}, branch {branch},"
        raise RequestError(
            f"{where} holds another model ({weights[0]}{' …' if len(weights) > 1 else ''}), which was not made by lox-merge. Choose another name, "
            "or publish beside it: a new --revision BRANCH, or --pull-request."
        )
