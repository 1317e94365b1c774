"""What the Hub keeps: repositories, their commits and references, and the bytes of files by sha256."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

LARGEST_REGULAR_FILE = 10 * 1024 * 1024
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".npz", ".zip", ".gz", ".parquet")


class HubError(Exception):
    """An answer other than success. `code` becomes X-Error-Code, by which the client tells kinds of failures apart."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit. `git_oid` is that of the LFS pointer where the file is a large one."""

    size: int
    sha256: str
    git_oid: str
    lfs: bool = False
    xet_hash: str | None = None


@dataclass(frozen=True)
class Commit:
    files: Mapping[str, StoredFile]
    parent: str | None
    message: str


@dataclass
class PullRequest:
    number: int
    title: str
    author: str
    status: str = "draft"


@dataclass
class Repository:
    """A model repository. `readers` are the users that a private or gated one lets in beside its owner."""

    name: str
    private: bool = False
    gated: bool = False
    readers: frozenset[str] = frozenset()
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    pull_requests: list[PullRequest] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        return self.name.split("/")[0]

    def resolve(self, revision: str) -> str:
        """Commit of a branch, a tag, or a commit itself, also by the beginning of its hash."""
        by_hash = next((commit for commit in self.commits if commit.startswith(revision)), None) if len(revision) >= 7 else None
        commit = self.branches.get(revision) or self.tags.get(revision) or by_hash
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def files(self, revision: str) -> Mapping[str, StoredFile]:
        return self.commits[self.resolve(revision)].files

    def commit(self, branch: str, files: Mapping[str, StoredFile], message: str) -> str:
        parent = self.branches.get(branch)
        # The time keeps two equal commits apart, as in git.
        identity = [parent, message, time.time_ns(), sorted((name, file.git_oid) for name, file in files.items())]
        commit = hashlib.sha1(json.dumps(identity).encode()).hexdigest()
        self.commits[commit] = Commit(dict(files), parent, message)
        self.branches[branch] = commit
        return commit


class BlobStore:
    """Bytes by sha256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def holds(self, sha256: str, size: int | None = None) -> bool:
        path = self.path(sha256)
        return path.is_file() and (size is None or path.stat().st_size == size)

    def put(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        self.path(sha256).write_bytes(data)
        return sha256

    def put_file(self, source: Path) -> str:
        return self.put(source.read_bytes())


def regular_file(blobs: BlobStore, data: bytes) -> StoredFile:
    """A file kept in git itself."""
    return StoredFile(size=len(data), sha256=blobs.put(data), git_oid=git_oid(data))


def large_file(sha256: str, size: int, xet_hash: str | None) -> StoredFile:
    """A file kept in LFS (and Xet) storage; git holds a pointer."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return StoredFile(size=size, sha256=sha256, git_oid=git_oid(pointer.encode()), lfs=True, xet_hash=xet_hash)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
