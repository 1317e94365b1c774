"""A Hub repository whose weight files are on disk only while they are needed, for models larger than the disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lox_merge.checkpoint import hub_cache
from lox_merge.checkpoint.files import HubFiles, check_file_name


@dataclass
class PassingFiles(HubFiles):
    """HubFiles that puts some files into a cache of its own, so that dropping them takes nothing that was there before.

    folder: that cache. passing: the files. What the user's cache holds already is read there and stays.
    """

    folder: Path = field(kw_only=True)
    passing: frozenset[str] = field(kw_only=True)

    @classmethod
    def of(cls, source: HubFiles, folder: Path, names: Sequence[str]) -> PassingFiles:
        """The files of `source`; those of `names` that its cache lacks will pass through `folder`."""
        absent = frozenset(name for name in names if hub_cache.cached_file(source.snapshot, name, source.cache_dir) is None)
        return cls(source.snapshot, source.cache_dir, folder=folder, passing=absent)

    def path(self, name: str) -> Path:
        if name not in self.passing:
            return super().path(name)
        check_file_name(name, self.title)
        self.fetch([name])
        return hub_cache.snapshot_folder(self.snapshot.repo_id, self.snapshot.commit, self.folder) / name

    def fetch(self, names: Sequence[str]) -> None:
        from lox_merge.checkpoint import hub

        through = [name for name in names if name in self.passing]
        if through:
            # What passes is gone before anybody could read it offline: no list of files is kept for that.
            hub.download(self.snapshot, through, self.folder, for_offline=False)
        if len(through) < len(names):
            super().fetch([name for name in names if name not in self.passing])

    def held(self) -> int:
        """Bytes of passing files that are on disk."""
        return sum(self.snapshot.files[name].size for name in self.passing if hub_cache.cached_file(self.snapshot, name, self.folder) is not None)

    def drop(self, name: str) -> None:
        """Removes a passing file from the disk; files of the user's cache stay. Unmap it first: a mapped file keeps its room."""
        if name not in self.passing:
            return
        snapshot = hub_cache.snapshot_folder(self.snapshot.repo_id, self.snapshot.commit, self.folder)
        link = snapshot / name
        content = Path(os.path.realpath(link))
        link.unlink(missing_ok=True)
        # Two files of equal content are one in the cache.
        if not any(Path(os.path.realpath(snapshot / other)) == content for other in self.passing):
            content.unlink(missing_ok=True)
