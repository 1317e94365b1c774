"""Sources that pass through the disk: a file is downloaded when its shard is written, and dropped after the last shard that reads it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.checkpoint.files import HubFiles
from lox_merge.checkpoint.passing_files import PassingFiles
from lox_merge.errors import RequestError, SourceChangedError
from lox_merge.jobs.stamps import SourceFile

# In the working state of an unfinished output, so that --overwrite and the end of the job clear it away.
DOWNLOADS = "downloads"


@dataclass
class Passing:
    """The weight files of Hub sources, shard by shard. needed: (role, file) of what each shard reads. folder: where they pass through."""

    checkpoints: Mapping[str, Checkpoint]
    needed: Sequence[Sequence[SourceFile]]
    folder: Path
    _left: Counter[SourceFile] = field(default_factory=Counter)

    @classmethod
    def through(cls, folder: Path, checkpoints: Mapping[str, Checkpoint], needed: Sequence[Sequence[SourceFile]]) -> Passing:
        """Lets the Hub sources of a plan pass through `folder`. Raises RequestError where there is none, or none that can."""
        hub = {role: checkpoint for role, checkpoint in checkpoints.items() if isinstance(checkpoint.source, HubFiles)}
        if not hub:
            raise RequestError("no model is on the Hub, so there is nothing to download: leave --low-disk out.")
        for role, checkpoint in hub.items():
            if checkpoint.pickled:
                raise RequestError(
                    f"{role}: {checkpoint.title} has no safetensors weights, and pytorch_model.bin can't be looked into without "
                    "downloading all of it. Leave --low-disk out."
                )
            assert isinstance(checkpoint.source, HubFiles)
            checkpoint.read_from(PassingFiles.of(checkpoint.source, folder / role, list(checkpoint.weight_headers)))
        return cls(checkpoints, needed, folder)

    @property
    def most_bytes(self) -> int:
        """Bytes of the passing files that are on disk at once, at most: those of one shard, and those kept for a later one."""
        last = {file: position for position, files in enumerate(self.needed) for file in files}
        held: set[SourceFile] = set()
        most = 0
        for position, files in enumerate(self.needed):
            held.update(files)
            most = max(most, sum(self._size(file) for file in held))
            held = {file for file in held if last[file] > position}
        return most

    @property
    def bytes_there(self) -> int:
        return sum(checkpoint.source.held() for checkpoint in self.checkpoints.values() if isinstance(checkpoint.source, PassingFiles))

    def start(self, todo: Sequence[int]) -> None:
        """These shards will be written, in this order: whatever else an earlier run or a check left behind goes."""
        self._left = Counter(file for position in todo for file in self.needed[position])
        soon = set(self.needed[todo[0]]) if todo else set()
        self.drop(self._files() - soon)

    def bring(self, position: int) -> None:
        """Downloads what one shard needs."""
        for role, checkpoint in self.checkpoints.items():
            checkpoint.source.fetch([name for other, name in self.needed[position] if other == role])

    def keep_only(self, position: int) -> None:
        """Drops whatever this shard does not need."""
        self.drop(self._files() - set(self.needed[position]))

    def missing_bytes(self, position: int) -> int:
        """Bytes that `bring` would download."""
        return sum(self._size(file) for file in self.needed[position]) - self.bytes_there

    def finish(self, position: int) -> None:
        """A shard is written and its sources are hashed: drops what no later one reads."""
        self._left.subtract(self.needed[position])
        self.drop(file for file in self.needed[position] if self._left[file] <= 0)

    def drop(self, files: Iterable[SourceFile]) -> None:
        for role, name in files:
            source = self.checkpoints[role].source
            if isinstance(source, PassingFiles):
                self.checkpoints[role].release(name)
                source.drop(name)

    def known(self, record: dict[str, Any]) -> dict[SourceFile, str]:
        """Hashes of passing sources as the record of a finished shard has them: nothing is downloaded again only to be hashed.

        They hold because the job names the commit, which fixes every byte, and the journal takes no other job. Where the Hub states a
        file's sha256, it is compared all the same. Raises SourceChangedError.
        """
        found = {}
        for role, files in record["sources"].items():
            source = self.checkpoints[role].source
            if not isinstance(source, PassingFiles):
                continue
            for name, digest in files.items():
                if name not in source.passing:
                    continue
                stated = source.snapshot.file(name).sha256
                if stated is not None and stated != digest:
                    raise SourceChangedError(
                        f"{role}: {name} of {source.title} is not the file that {record['output']['file']} was made from. "
                        "Pass --overwrite to start anew."
                    )
                found[role, name] = digest
        return found

    def clear(self) -> None:
        self.drop(self._files())
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> set[SourceFile]:
        return {file for files in self.needed for file in files}

    def _size(self, file: SourceFile) -> int:
        source = self.checkpoints[file[0]].source
        return source.snapshot.file(file[1]).size if isinstance(source, PassingFiles) and file[1] in source.passing else 0
