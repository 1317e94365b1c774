"""Hashes of sources that are taken where the shards are written: each file by one shard's worker, compared for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lox_merge.jobs.engine import first_stamp, source_path
from lox_merge.jobs.executors.protocol import ShardJob
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.stamps import SourceFile, check_stamp
from lox_merge.jobs.store import changed_on_the_way, check_stated


class Ledger(Protocol):
    """What is known of the sources of shards that are being written."""

    def to_hash(self, position: int) -> list[SourceFile]:
        """What the worker of this shard reads through."""
        ...

    def found(self, file: SourceFile, digest: str) -> None: ...

    def complete(self, position: int) -> bool: ...

    def hashes(self, position: int) -> dict[SourceFile, str]:
        """Hashes of the files of one shard that is written. Raises SourceChangedError where one is not what it was."""
        ...


def ledger_of(job: ShardJob, order: Sequence[int]) -> Ledger:
    return DownloadLedger(job.plan, order) if job.plan.store else SourceLedger(job, order)


class DownloadLedger:
    """For workers that download for themselves: each file is hashed wherever it arrives, and has to be the same everywhere."""

    def __init__(self, plan: Plan, order: Sequence[int]) -> None:
        self._plan = plan
        self._needed = {position: plan.shards[position].sources(plan.checkpoints) for position in order}
        self._hashes: dict[SourceFile, str] = {}

    def to_hash(self, position: int) -> list[SourceFile]:
        return self._needed[position]

    def found(self, file: SourceFile, digest: str) -> None:
        """Raises SourceChangedError for another hash than the Hub's, or than that of another worker."""
        checkpoint = self._plan.checkpoints[file[0]]
        check_stated(checkpoint, file[1], digest)
        if self._hashes.setdefault(file, digest) != digest:
            raise changed_on_the_way(checkpoint, file[1])

    def complete(self, position: int) -> bool:
        return all(file in self._hashes for file in self._needed[position])

    def hashes(self, position: int) -> dict[SourceFile, str]:
        return {file: self._hashes[file] for file in self._needed[position]}


class SourceLedger:
    """Says which shard's worker hashes which files, so that none is read twice for it, and collects what they found.

    order: positions of the shards as they will be begun; the first shard that reads a file has it hashed.
    """

    def __init__(self, job: ShardJob, order: Sequence[int]) -> None:
        self._plan = job.plan
        self._needed = {position: job.plan.shards[position].sources(job.plan.checkpoints) for position in order}
        known = job.hasher.known()
        self._hashes = {file: digest for file, (digest, _) in known.items()}
        self._stamps = {file: before for file, (_, before) in known.items()}
        self._reader: dict[SourceFile, int] = {}
        for position, files in self._needed.items():
            for file in files:
                self._reader.setdefault(file, position)
                if file not in self._stamps:
                    # Taken before anybody reads: whatever is written to it from now on shows.
                    self._stamps[file] = first_stamp(self._plan, file)

    def to_hash(self, position: int) -> list[SourceFile]:
        return [file for file in self._needed[position] if self._reader[file] == position and file not in self._hashes]

    def found(self, file: SourceFile, digest: str) -> None:
        self._hashes[file] = digest

    def complete(self, position: int) -> bool:
        return all(file in self._hashes for file in self._needed[position])

    def hashes(self, position: int) -> dict[SourceFile, str]:
        for file in self._needed[position]:
            check_stamp(file, source_path(self._plan, file), self._stamps[file])
        return {file: self._hashes[file] for file in self._needed[position]}
