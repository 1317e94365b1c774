"""A whole job whose matrices are edited as on a GPU, in batches through a pipeline, with the CPU in the GPU's place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lox_merge.jobs.batched_ahead import BatchedAhead
from lox_merge.jobs.execute import Silent
from lox_merge.jobs.executors.run import run
from lox_merge.jobs.executors.serial import Serial
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.manifest import job_description
from lox_merge.jobs.pipeline import Pipeline
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.work import Crew

CPU = torch.device("cpu")


@dataclass
class Batched:
    """Writes the shards of plans. settings: of the pipelines. started: how many batches each had in flight at most."""

    settings: dict[str, Any] = field(default_factory=dict)

    def look_ahead(self, plan: Plan, todo: list[int], crew: Crew) -> BatchedAhead:
        return BatchedAhead(plan, todo, crew.owned(lambda: Pipeline(crew.device, **{"buffer_bytes": 4096, **self.settings})))

    def write(self, plan: Plan) -> list[dict[str, Any]]:
        """The shards into plan.out, without what comes beside them. Returns their records."""
        journal = Journal(plan.out)
        with journal.locked():
            journal.begin(job_description(plan, CPU))
            return run(plan, journal, CPU, Silent(), Serial(look_ahead=self.look_ahead))


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
