"""The Hub's cache on this machine, read and completed without the network.

Layout as documented for all its users: https://huggingface.co/docs/hub/local-cache
"""

from __future__ import annotations

import os
import re
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path

from lox_merge.checkpoint.hub_reference import HubFile, HubReference, HubSnapshot
from lox_merge.errors import LoxMergeWarning, SourceError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def snapshot_folder(repo_id: str, commit: str, cache_dir: Path | None) -> Path:
    """Where the files of this commit are, or will be. cache_dir: None for HF_HUB_CACHE."""
    return _repository_folder(repo_id, cache_dir) / "snapshots" / commit


def cached_file(snapshot: HubSnapshot, name: str, cache_dir: Path | None) -> Path | None:
    """The file, if the cache holds all of it."""
    path = snapshot_folder(snapshot.repo_id, snapshot.commit, cache_dir) / name
    return path if path.is_file() and path.stat().st_size == snapshot.files[name].size else None


def resolve_offline(reference: HubReference, cache_dir: Path | None) -> HubSnapshot:
    """The snapshot as the cache knows it.

    The file list is the Hub's own where the cache kept it. Otherwise it is what was downloaded, with a LoxMergeWarning, because a
    file that was never fetched (a chat template, say) would be missed by nobody. Raises SourceError when nothing is cached.
    """
    commit = _cached_commit(reference, cache_dir)
    folder = None if commit is None else snapshot_folder(reference.repo_id, commit, cache_dir)
    if commit is None or folder is None or not folder.is_dir():
        raise SourceError(
            f"{reference} is not in the local cache, and offline mode is on (HF_HUB_OFFLINE). "
            f"Download it first with `hf download {reference.repo_id}{f' --revision {reference.revision}' if reference.revision else ''}`, "
            "or unset HF_HUB_OFFLINE."
        )
    files = _kept_listing(reference.repo_id, commit, cache_dir)
    if files is None:
        warnings.warn(
            f"{reference} is read offline from the local cache, which does not know the repository's full list of files: whatever was "
            "not downloaded is taken for absent. Download it whole with `hf download`, or unset HF_HUB_OFFLINE.",
            LoxMergeWarning,
            stacklevel=2,
        )
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = [HubFile(path.relative_to(folder).as_posix(), path.stat().st_size, _sha256(path)) for path in paths]
    return HubSnapshot(reference.repo_id, reference.revision, commit, {file.name: file for file in files})


def remember_revision(snapshot: HubSnapshot, cache_dir: Path | None) -> None:
    """Notes which commit the revision means, so that it can be found offline. A cache that cannot be written stays as it is."""
    from huggingface_hub.constants import DEFAULT_REVISION

    revision = snapshot.revision or DEFAULT_REVISION
    if revision == snapshot.commit:
        return
    note = _repository_folder(snapshot.repo_id, cache_dir) / "refs" / revision
    temporary = note.with_name(f"{note.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        if note.is_file() and note.read_text() == snapshot.commit:
            return
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(snapshot.commit)
        temporary.replace(note)
    except OSError:
        temporary.unlink(missing_ok=True)


def missing_offline(snapshot: HubSnapshot, names: Iterable[str]) -> SourceError:
    listed = ", ".join(names)
    return SourceError(
        f"{snapshot}: {listed} is not in the local cache, and offline mode is on (HF_HUB_OFFLINE). "
        "Unset HF_HUB_OFFLINE and run the same command once to download it."
    )


def _repository_folder(repo_id: str, cache_dir: Path | None) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(cache_dir or HF_HUB_CACHE).expanduser().resolve() / f"models--{repo_id.replace('/', '--')}"


def _cached_commit(reference: HubReference, cache_dir: Path | None) -> str | None:
    from huggingface_hub.constants import DEFAULT_REVISION

    revision = reference.revision or DEFAULT_REVISION
    if _COMMIT.fullmatch(revision):
        return revision
    note = _repository_folder(reference.repo_id, cache_dir) / "refs" / revision
    commit = note.read_text().strip() if note.is_file() else ""
    return commit if _COMMIT.fullmatch(commit) else None


def keeps_listing(snapshot: HubSnapshot, cache_dir: Path | None) -> bool:
    """True when the cache holds the Hub's list of files for this commit."""
    return _kept_listing(snapshot.repo_id, snapshot.commit, cache_dir) is not None


def _kept_listing(repo_id: str, commit: str, cache_dir: Path | None) -> list[HubFile] | None:
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:  # early versions of huggingface_hub 1 keep no listing
        return None
    try:
        tree = get_cached_repo_tree(repo_id, revision=commit, cache_dir=cache_dir)
    except CachedRepoTreeNotFoundError:
        return None
    folder = snapshot_folder(repo_id, commit, cache_dir)
    return [HubFile(file.path, file.size, _sha256(folder / file.path)) for file in tree]


def _sha256(path: Path) -> str | None:
    # The cache links to content that is named by its etag, and the etag of a large file is its sha256.
    content = Path(os.path.realpath(path)).name
    return content if _SHA256.fullmatch(content) else None
