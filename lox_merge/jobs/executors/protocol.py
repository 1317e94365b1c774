"""What an executor is to a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lox_merge.jobs.engine import Progress
from lox_merge.jobs.hashing import SourceHasher
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.plan import Plan


@dataclass(frozen=True)
class ShardJob:
    """A plan whose output is locked and begun. hasher: what the sources of finished shards were read with."""

    plan: Plan
    journal: Journal
    device: torch.device
    hasher: SourceHasher
    progress: Progress


class Executor(Protocol):
    """Writes shards; each is written to its temporary file, synced, renamed and recorded, so that any executor goes on after any other."""

    @property
    def reads_ahead(self) -> int:
        """How many shards ahead of the work the job's hasher may read."""
        ...

    @property
    def workers(self) -> int:
        """How many write at a time, at most; once it has written, how many did."""
        ...

    def write(self, job: ShardJob, todo: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Writes the shards at these positions of the plan. Returns their records.

        Raises NonFiniteDeltaError, WriteError, SourceChangedError, NumericalError; finished shards stay.
        """
        ...
