"""Shards that are to stay on no disk of ours: workers send each to a store when it is made, and OUT keeps everything else."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lox_merge.checkpoint.adapter_files import OverBase
from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.checkpoint.files import FileSource, HubFiles
from lox_merge.checkpoint.json_text import parse_json
from lox_merge.errors import RequestError, SourceChangedError

if TYPE_CHECKING:
    from lox_merge.jobs.plan import Plan

# Beside the manifest of an output whose weights are elsewhere: where they are.
WEIGHTS_NOTE = "lox_merge_weights.json"
# The working folder of workers, of which no other machine has to know.
_ELSEWHERE = Path("out")


class Store(Protocol):
    """Where finished shards go. Plain data: it travels to the workers, and holds neither token nor path.

    identity: what the journal keeps, to see that an interrupted job goes on with the same store.
    """

    @property
    def identity(self) -> dict[str, str]: ...

    def prepare(self) -> None:
        """Makes the place, asked on the machine of the one who gives orders. Nothing in it shows before the end."""
        ...

    def check_here(self) -> None:
        """Raises LoxMergeError where this machine could not send."""
        ...

    def send(self, file: str, path: Path, size: int, sha256: str) -> None:
        """Takes the shard `file` of the output, which is at `path`. Sent twice it is there once. Raises LoxMergeError."""
        ...


def hub_source(source: FileSource, name: str) -> HubFiles | None:
    """The files on the Hub that `name` of a source is among; None for a file of a folder."""
    while isinstance(source, OverBase):
        source = source.holder(name)
    return source if isinstance(source, HubFiles) else None


def check_can_travel(plan: Plan) -> None:
    """Raises RequestError for a plan that workers cannot carry out on machines that share nothing with this one."""
    for role, checkpoint in plan.checkpoints.items():
        local = [name for name in checkpoint.weight_headers if hub_source(checkpoint.source, name) is None]
        if local:
            raise RequestError(
                f"{role}: {checkpoint.title} is a folder of this machine, which workers elsewhere do not see. Give a Hub id, "
                "or leave --weights-on-hub out and put OUT and the models on storage that all machines share."
            )
        if checkpoint.pickled:
            raise RequestError(
                f"{role}: {checkpoint.title} has no safetensors weights, and pytorch_model.bin can't be looked into without "
                "downloading all of it. Leave --weights-on-hub out."
            )


def check_some_difference(plan: Plan) -> None:
    """Raises RequestError where the Hub states the same content for the weights of two models: nothing has to be downloaded to see it."""
    first, *others = plan.checkpoints.values()
    for other in others:
        stated = [{_stated(checkpoint, name) for name in checkpoint.weight_headers} for checkpoint in (first, other)]
        if stated[0] == stated[1] and None not in stated[0]:
            raise no_difference(plan)


def no_difference(plan: Plan) -> RequestError:
    return RequestError(
        f"all {len(plan.edited)} deltas are zero: base ({plan.base.title}) and aligned ({plan.aligned.title}) hold the same weights. "
        "The likely mistake: one model was given twice, or base is a copy of aligned. Give the model that aligned was trained from as base."
    )


def plan_for_elsewhere(plan: Plan) -> Plan:
    """A copy that names no folder of this machine: workers have caches and working folders of their own."""
    travelling = copy.deepcopy(plan)
    travelling.out = _ELSEWHERE
    for checkpoint in travelling.checkpoints.values():
        for name in checkpoint.weight_headers:
            source = hub_source(checkpoint.source, name)
            assert source is not None, "check_can_travel looked for it"
            source.cache_dir = None
    return travelling


def check_holds_weights(source: FileSource) -> None:
    """Raises RequestError for an output whose weights are in a store, and says where."""
    if WEIGHTS_NOTE not in source.names():
        return
    try:
        note = parse_json(source.path(WEIGHTS_NOTE).read_bytes())
        place = f"{note['repository']}@{note['commit']}"
    except (OSError, ValueError, KeyError, TypeError):
        place = "REPO"
    raise RequestError(f"{source.title} holds no weights: they are on the Hub. Check them there: lox-merge verify {place}.")


def recorded_hashes(checkpoints: Mapping[str, Checkpoint], record: dict[str, Any]) -> dict[tuple[str, str], str]:
    """Hashes of a finished shard's sources as its record has them: they hold because the job names the commits, which fix every byte.

    Where the Hub states a file's sha256 it is compared all the same. Raises SourceChangedError.
    """
    found = {}
    for role, files in record["sources"].items():
        for name, digest in files.items():
            if _stated(checkpoints[role], name) not in (None, digest):
                raise changed_on_the_way(checkpoints[role], name)
            found[role, name] = digest
    return found


def check_stated(checkpoint: Checkpoint, name: str, digest: str) -> None:
    """Raises SourceChangedError where a downloaded file is not what the Hub states."""
    if _stated(checkpoint, name) not in (None, digest):
        raise changed_on_the_way(checkpoint, name)


def changed_on_the_way(checkpoint: Checkpoint, name: str) -> SourceChangedError:
    return SourceChangedError(
        f"{checkpoint.role}: {name} of {checkpoint.title} did not arrive as the Hub has it: its sha256 is another. Nothing of this shard was kept; "
        "run the same command again, which downloads it anew."
    )


def _stated(checkpoint: Checkpoint, name: str) -> str | None:
    source = hub_source(checkpoint.source, name)
    return source.snapshot.file(name).sha256 if source is not None else None
