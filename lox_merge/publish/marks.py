"""What surrounds the commit: the repository and its branch, a pull request, a tag. Each is looked for before it is made."""

from __future__ import annotations

from typing import Any

from lox_merge._version import __version__
from lox_merge.checkpoint.hub_failures import status_of
from lox_merge.errors import PublishError
from lox_merge.publish.access import Target, hub_api
from lox_merge.publish.failures import insistently

_TAG = f"lox-merge-v{__version__}"
_MOST_TAGS = 1000


def ensure_repository(target: Target) -> bool:
    """Makes the repository and the branch where they are not there; True if the repository is new. Never changes visibility."""
    from huggingface_hub.errors import HfHubHTTPError

    api = hub_api()

    def create() -> None:
        try:
            api.create_repo(target.repo, private=target.private)
        except HfHubHTTPError as error:
            if status_of(error) != 409:  # there by now: another attempt of ours, or of somebody else
                raise

    if not target.exists:
        insistently(create)
        private = bool(insistently(lambda: api.model_info(target.repo)).private)
        if private != target.private:
            is_, wanted = ("private", "public") if private else ("public", "private")
            raise PublishError(f"{target.repo} was to be {wanted}, and the Hub has it as {is_}. Nothing was uploaded. Look at it on the Hub.")
    if not target.branch_exists:
        insistently(lambda: api.create_branch(target.repo, branch=target.branch, exist_ok=True))
    return not target.exists


def ensure_pull_request(target: Target, title: str, description: str) -> tuple[str, str]:
    """(git reference, URL) of the user's open pull request with this title, an earlier one if there is one."""
    api = hub_api()

    def find_or_open() -> Any:
        for found in api.get_repo_discussions(target.repo, author=target.user, discussion_type="pull_request"):
            if found.title == title and found.author == target.user and found.status in ("open", "draft"):
                return found
        return api.create_pull_request(target.repo, title, description=description)

    request = insistently(find_or_open)
    return str(request.git_reference), str(request.url)


def ensure_tag(repo: str, commit: str) -> str:
    """A tag lox-merge-vVERSION on the commit: the one that is there, else the first free name. Tags of other commits stay as they are."""
    api = hub_api()

    def find_or_set() -> str:
        from huggingface_hub.errors import HfHubHTTPError

        tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}
        names = [_TAG, *(f"{_TAG}-{number}" for number in range(2, _MOST_TAGS))]
        for name in names:
            if tags.get(name) == commit:
                return name
        free = next(name for name in names if name not in tags)
        try:
            api.create_tag(repo, tag=free, revision=commit, tag_message="Made with lox-merge")
        except HfHubHTTPError as error:
            if status_of(error) == 409:  # set meanwhile
                return find_or_set()
            raise
        return free

    return insistently(find_or_set)
