"""The work of a worker whose machine shares no storage: it downloads what a shard needs, and sends the shard away."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lox_merge.errors import LoxMergeError, RequestError
from lox_merge.jobs.direct_file import DirectFile
from lox_merge.jobs.executors.writer import ShardWriter, Tell, WorkerTask
from lox_merge.jobs.output_folder import check_room
from lox_merge.jobs.stamps import SourceFile


class SendingWriter(ShardWriter):
    """As ShardWriter, in a folder of its own. A written shard is told when the store has it; of sources, only those of one shard are there."""

    def __init__(self, task: WorkerTask, tell: Tell, folder: Path) -> None:
        store = task.plan.store
        assert store is not None
        try:
            store.check_here()
        except LoxMergeError as error:
            raise RequestError(f"a worker on {socket.gethostname()} can't send shards to the Hub. {error}") from error
        plan = replace(task.plan, out=folder / task.plan.out)
        plan.let_sources_pass()
        assert plan.passing is not None
        super().__init__(replace(task, plan=plan), tell)
        self._store, self._passing = store, plan.passing
        self._journal.folder.mkdir(parents=True)

    def write(self, position: int, to_hash: Sequence[SourceFile]) -> None:
        for before in self._hashes:
            self._wait_for_hashes(before)  # its files go now
        self._passing.keep_only(position)
        # The shard before may still be on its way out; its room is taken already.
        check_room(self._plan.out, max(0, self._passing.missing_bytes(position)) + self._plan.shards[position].header.file_size)
        self._passing.bring(position)
        super().write(position, to_hash)

    def _finish(self, file: DirectFile, position: int, record: dict[str, Any]) -> None:
        file.close()
        self._wait_for_hashes(position)  # the sources are told before the shard that was made from them
        partial, output = self._partial(position), record["output"]
        self._store.send(output["file"], partial, output["size"], output["sha256"])
        partial.unlink()
        self._tell("written", position, record)

    def _wait_for_hashes(self, position: int) -> None:
        for future in self._hashes[position]:
            future.result()

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._plan.out, ignore_errors=True)
