"""Names of things on the Hub: what a user writes, and what one look at the Hub makes of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lox_merge.errors import SourceError

# git's own rules for reference names (git-check-ref-format), as far as they matter here: an offline look-up makes a path of it.
_REVISION = re.compile(r"(?!.*(\.\.|//|/\.|@\{|\.lock(/|$)))[^\s\x00-\x1f\x7f~^:?*\[\\/.-][^\s\x00-\x1f\x7f~^:?*\[\\]*(?<![/.])")


@dataclass(frozen=True)
class HubReference:
    """A repository as asked for. revision: branch, tag, commit, or a reference such as refs/pr/1; None for the default branch."""

    repo_id: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id


@dataclass(frozen=True)
class HubFile:
    """One file of a snapshot. size: bytes. sha256: of the content, as the Hub states it for LFS and Xet files; None for others."""

    name: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class HubSnapshot:
    """A repository at one commit, which cannot change any more. revision: as asked for. files: by name, in the Hub's order."""

    repo_id: str
    revision: str | None
    commit: str
    files: Mapping[str, HubFile] = field(repr=False)

    def __str__(self) -> str:
        return str(HubReference(self.repo_id, self.revision))

    def file(self, name: str) -> HubFile:
        """Raises SourceError if the snapshot has no such file."""
        if name not in self.files:
            raise SourceError(f"{self} has no file {name} at commit {self.commit[:12]}. Check the name and the revision.")
        return self.files[name]


def parse_hub_reference(text: str) -> HubReference | None:
    """`org/name` or `org/name@revision`; None when the text cannot be a Hub id (a path, a bare name, a URL).

    The name has to pass huggingface_hub's own validator. A bare name such as `gpt2` counts as a path, not as an id.
    """
    repo_id, separator, revision = text.partition("@")
    if repo_id.count("/") != 1 or (separator and not _REVISION.fullmatch(revision)):
        return None
    # Imported here: it takes a tenth of a second, which `--help` should not cost.
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return None
    return HubReference(repo_id, revision or None)
