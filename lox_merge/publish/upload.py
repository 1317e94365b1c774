"""Files into one commit: compared first, uploaded in pieces that can be gone on with, committed once, compared again.

One commit, so that nobody ever sees half a model. Nothing is sent that is there already; an answer that was lost on its way back is
found out by looking, not by sending again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lox_merge.checkpoint.hub_failures import server_message, status_of
from lox_merge.checkpoint.json_text import parse_json
from lox_merge.errors import PublishError
from lox_merge.jobs.output_folder import MANIFEST
from lox_merge.publish.access import WEIGHTS, check_xet, hub_api
from lox_merge.publish.failures import Sent, insistently
from lox_merge.publish.output import FinishedOutput, OutputFile, changed
from lox_merge.publish.picture import PICTURE

# Larger files go to the Hub's storage for large files from disk; smaller ones may travel inside the commit, so they are held.
_HELD_BYTES = 10 * 2**20
# A few at a time: what was uploaded before an interruption is not uploaded again.
_TOGETHER = 4
_KEPT = {".gitattributes", ".gitignore"}


@dataclass(frozen=True)
class Item:
    """One file to publish. data: its bytes, for small files and the card; None: read from `file` when it is sent. Without both it is a
    large file that the Hub holds already, and that a commit has only to name."""

    name: str
    size: int
    sha256: str
    data: bytes | None = field(repr=False)
    file: OutputFile | None = field(default=None, repr=False)

    @property
    def held_by_hub(self) -> bool:
        return self.data is None and self.file is None

    @property
    def content(self) -> bytes | Path:
        if self.data is not None:
            return self.data
        assert self.file is not None
        return self.file.path

    def check_unchanged(self) -> None:
        if self.file is not None:
            self.file.check_unchanged()


@dataclass(frozen=True)
class Remote:
    """A branch of the repository as the Hub lists it. files: name to sha256 (large files) or git's own hash (others)."""

    head: str
    files: Mapping[str, str] = field(repr=False)

    def holds(self, item: Item) -> bool:
        known = self.files.get(item.name)
        return known is not None and known in (item.sha256, _git_hash(item))

    def differs(self, items: Sequence[Item]) -> list[Item]:
        return [item for item in items if not self.holds(item)]

    def obsolete(self, items: Sequence[Item], earlier: Collection[str]) -> list[str]:
        """Files that no longer belong: weights, which would be taken for the model's, and those of an earlier output. Others stay."""
        wanted = {item.name for item in items} | _KEPT
        return [name for name in self.files if name not in wanted and (name in earlier or _is_weight(name))]


class UploadsGoneError(PublishError):
    """Files that were uploaded before the commit are not there any more. files: their names."""

    def __init__(self, repo: str, files: Sequence[str]) -> None:
        self.repo, self.files = repo, tuple(files)
        super().__init__(
            f"{repo}: the Hub does not hold what was uploaded of {', '.join(files[:4])}{' …' if len(files) > 4 else ''} any more. "
            "Nothing was committed. Run the same command again: it makes them again, and no others."
        )


@dataclass(frozen=True)
class Uploaded:
    """commit: of the branch, new or found. sent: files that were not there."""

    commit: str
    sent: tuple[Item, ...]
    removed: tuple[str, ...]


def items_of(output: FinishedOutput, extra: Mapping[str, bytes]) -> list[Item]:
    """The output's files, small ones read and compared with the manifest, and `extra` (the card). Raises SourceChangedError."""
    items = []
    shards = {entry["file"] for entry in output.manifest["output"]["shards"]}
    for file in output.files:
        data = file.path.read_bytes() if file.name not in shards and file.size <= _HELD_BYTES else None
        if data is not None and hashlib.sha256(data).hexdigest() != file.sha256:
            raise changed(file.name)
        items.append(Item(file.name, file.size, file.sha256, data, file))
    items += [Item(name, len(data), hashlib.sha256(data).hexdigest(), data) for name, data in extra.items()]
    return items


def look(repo: str, revision: str) -> Remote:
    """The branch as it is now."""
    information = insistently(lambda: hub_api().model_info(repo, revision=revision, files_metadata=True, timeout=30))
    files = {sibling.rfilename: sibling.lfs.sha256 if sibling.lfs else sibling.blob_id for sibling in information.siblings or []}
    return Remote(information.sha, files)


def files_of_earlier_output(repo: str, there: Remote) -> frozenset[str]:
    """What the manifest on that branch names beside weights, and the card's picture; empty where there is no manifest."""
    if MANIFEST not in there.files:
        return frozenset()
    path = insistently(lambda: hub_api().hf_hub_download(repo, MANIFEST, revision=there.head))
    try:
        return frozenset(parse_json(Path(path).read_bytes())["output"]["files"]) | {PICTURE}
    except (ValueError, KeyError, TypeError):
        return frozenset()


def upload(repo: str, revision: str, items: Sequence[Item], message: str, *, earlier: Collection[str] = (), sent: Sent | None = None) -> Uploaded:
    """Makes the branch hold these files, no other weights, and nothing else of an `earlier` output (names of its files). sent: is told.

    Raises SourceChangedError for a file that changed under way, PublishError when somebody else wrote to the branch meanwhile, and
    the library's errors.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    before = look(repo, revision)
    missing, obsolete = before.differs(items), before.obsolete(items, earlier)
    if not missing and not obsolete:
        return Uploaded(before.head, (), ())
    additions = [_addition_of_held(item) if item.held_by_hub else CommitOperationAdd(item.name, item.content) for item in missing]
    check_xet(repo, revision)
    here = [(item, addition) for item, addition in zip(missing, additions, strict=True) if not item.held_by_hub]
    for start in range(0, len(here), _TOGETHER):
        some = here[start : start + _TOGETHER]
        send(repo, revision, [item for item, _ in some], [addition for _, addition in some])
        if sent and any(addition._upload_mode == "lfs" for _, addition in some):
            sent.any = True
    for item in items:
        item.check_unchanged()
    operations = [*additions, *(CommitOperationDelete(name) for name in obsolete)]

    def commit() -> str:
        now = look(repo, revision)
        if not now.differs(items) and not now.obsolete(items, earlier):
            return now.head  # an earlier attempt did it, and only its answer was lost
        if now.head != before.head:
            raise PublishError(
                f"{repo}: somebody else changed {revision} meanwhile (it is at {now.head[:12]}). Nothing of this was committed; look at what they "
                "did, and run the same command again."
            )
        return str(hub_api().create_commit(repo, operations, commit_message=message, revision=revision, parent_commit=before.head).oid)

    try:
        done = insistently(commit, also=frozenset({412}))
    except HfHubHTTPError as error:
        gone = _gone(error, [item for item in missing if item.held_by_hub])
        if gone:
            raise UploadsGoneError(repo, gone) from error
        raise
    wrong = look(repo, done).differs(items)
    if wrong:
        raise PublishError(f"{repo}: after the commit {done[:12]}, {wrong[0].name} is not there as it was sent. Run the same command again.")
    return Uploaded(done, tuple(missing), tuple(obsolete))


def _addition_of_held(item: Item) -> Any:
    """The operation as it is after the upload, which may have been another machine's."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    addition = CommitOperationAdd(item.name, b"")
    addition.upload_info = UploadInfo(size=item.size, sample=b"", sha256=bytes.fromhex(item.sha256))
    addition._upload_mode, addition._is_uploaded = "lfs", True
    return addition


def _gone(error: Exception, held: Sequence[Item]) -> list[str]:
    """Which of these files a refused commit is about: the Hub does not hold them (any more). All, where it does not say which."""
    message = server_message(error)
    if status_of(error) not in (400, 404, 422) or "lfs" not in message.lower() or "does not exist" not in message:
        return []
    return [item.name for item in held if item.name in message or item.sha256 in message] or [item.name for item in held]


def send(repo: str, revision: str, items: Sequence[Item], additions: Sequence[Any]) -> None:
    """Uploads the large ones among these files without a commit, and makes sure that what was sent is what was verified."""
    for item in items:
        item.check_unchanged()
    try:
        # The library and hf_xet try every request of this for a while themselves.
        hub_api().preupload_lfs_files(repo, additions, revision=revision, num_threads=_TOGETHER)
    except Exception:
        for item in items:  # a file that shrinks under way ends in any error whatever
            item.check_unchanged()
        raise
    for item, addition in zip(items, additions, strict=True):
        if addition._should_ignore:
            raise PublishError(f"{repo}: its .gitignore keeps {item.name} out, so the model would be incomplete. Remove that line there.")
        # The client hashed what it sent: the one comparison that no change in between can escape.
        if addition.upload_info.is_hashed and addition.upload_info.sha256.hex() != item.sha256:
            raise changed(item.name)


def _git_hash(item: Item) -> str | None:
    """git's hash of a blob; None for large files, which are known by their sha256."""
    return None if item.data is None else hashlib.sha1(b"blob %d\0" % item.size + item.data).hexdigest()


def _is_weight(name: str) -> bool:
    return PurePosixPath(name).suffix in WEIGHTS or name.endswith((".safetensors.index.json", ".bin.index.json"))
