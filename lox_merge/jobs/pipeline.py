"""A device kept busy: sources read and sent, batches edited, results fetched, each in threads of its own.

reader (1 thread)  file → pinned buffer → device
editors (3)        a stream each: delta, SVD, update; while one waits for its stop test, the device works for the others
fetcher (1)        device → pinned buffer → output; here a batch that did not fit is edited again, matrix by matrix
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lox_merge.errors import LoxMergeWarning
from lox_merge.jobs.batches import Batch
from lox_merge.jobs.device_memory import is_out_of_memory, make_room, memory_budget
from lox_merge.jobs.edit import Edit, MatrixOutcome
from lox_merge.jobs.transfers import BUFFER_BYTES, BUFFERS, Mark, Transfers, mark_here
from lox_merge.jobs.triplets import TripletSource
from lox_merge.jobs.work import available_cores, computing_pool

EDITORS = 3
# Threads that solve the small eigenproblems of stop tests; more than eight matrices are seldom tested at once.
_SOLVERS = 8

Stacked = Mapping[str, Tensor]
Sources = Sequence[Mapping[str, Tensor]]
Edited = tuple[Stacked, Tensor, list[MatrixOutcome], Mark]


class Pipeline:
    """See above. budget: bytes that batches in flight may take on the device together; default from what is free there now."""

    def __init__(
        self, device: torch.device, *, editors: int = EDITORS, buffers: int = BUFFERS, buffer_bytes: int = BUFFER_BYTES, budget: int | None = None
    ) -> None:
        self.device = device
        # One batch in each editor, one being read, one being fetched.
        self.depth = editors + 2
        self.budget = memory_budget(device) if budget is None else budget
        self._up, self._down = (Transfers(device, buffers=buffers, size=buffer_bytes) for _ in range(2))
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")
        cores = torch.get_num_threads()
        self._editors = computing_pool(editors, cores, "edit")
        self._fetcher = computing_pool(1, cores, "fetch")
        self.solvers: Executor = computing_pool(max(1, min(_SOLVERS, available_cores())), cores, "solve")
        self._own = threading.local()

    def submit(
        self, edit: Edit, triplets: TripletSource, batch: Batch, sources: Sources, outs: Sequence[Tensor], *, together: bool = True
    ) -> Future[list[MatrixOutcome]]:
        """Edits the matrices of a batch into `outs`, host memory. sources: of each, by role. Batches end in the order of submission.

        together: False where the device has no room for all of them at a time.
        """
        if not together:
            return self._fetcher.submit(self._one_by_one, edit, triplets, batch, sources, outs)
        loading = self._reader.submit(self._load, sources)
        editing = self._editors.submit(self._edit, loading, edit, triplets, batch, outs[0].dtype)
        return self._fetcher.submit(self._fetch, editing, edit, triplets, batch, sources, outs)

    def close(self) -> None:
        for pool in (self._reader, self._editors, self._fetcher, self.solvers):
            pool.shutdown(wait=True, cancel_futures=True)
        self._up.close()
        self._down.close()

    def _load(self, sources: Sources) -> tuple[Stacked, Mark]:
        shape = (len(sources), *next(iter(sources[0].values())).shape)
        stacked = {role: torch.empty(shape, dtype=stored.dtype, device=self.device) for role, stored in sources[0].items()}
        pairs = ((matrix, stacked[role][place]) for place, matrices in enumerate(sources) for role, matrix in matrices.items())
        return stacked, self._up.upload(pairs)

    def _edit(self, loading: Future[tuple[Stacked, Mark]], edit: Edit, triplets: TripletSource, batch: Batch, dtype: torch.dtype) -> Edited:
        stacked, arrived = loading.result()
        with self._stream():
            arrived.order()
            out = torch.empty((len(batch.members), *batch.shape), dtype=dtype, device=self.device)
            members = [(member.tensor, member.view) for member in batch.members]
            outcomes = list(edit.batch(stacked, out, members, self.device, triplets, self.solvers.map))
            # The sources go along: their memory must not be given to the reader before the device is done with them.
            return stacked, out, outcomes, mark_here(self.device)

    def _fetch(
        self, editing: Future[Edited], edit: Edit, triplets: TripletSource, batch: Batch, sources: Sources, outs: Sequence[Tensor]
    ) -> list[MatrixOutcome]:
        try:
            _, out, outcomes, edited = editing.result()
            self._down.download(zip(out, outs, strict=True), after=edited)
            return outcomes
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            make_room(error, self.device)
        warnings.warn(f"{_described(batch)} did not fit on {self.device} together{_ONE_BY_ONE}", LoxMergeWarning, stacklevel=2)
        return self._one_by_one(edit, triplets, batch, sources, outs)

    def _one_by_one(self, edit: Edit, triplets: TripletSource, batch: Batch, sources: Sources, outs: Sequence[Tensor]) -> list[MatrixOutcome]:
        return [
            edit.matrix(matrices, out, member.view, member.tensor, self.device, triplets)
            for member, matrices, out in zip(batch.members, sources, outs, strict=True)
        ]

    def _stream(self) -> AbstractContextManager[object]:
        """The stream of this thread. Each has a handle and a work space of the product library of its own: with a shared one, it would
        matter for the bits what runs at the same time."""
        if self.device.type != "cuda":
            return nullcontext()
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream: AbstractContextManager[object] = torch.cuda.stream(self._own.stream)
        return stream

    def warn_of_size(self, batch: Batch, needed: int) -> None:
        """A batch that cannot fit is not tried."""
        warnings.warn(
            f"{_described(batch)} need {needed / 1e9:.2g} GB together and {self.device} has {self.budget / 1e9:.2g} GB for them{_ONE_BY_ONE}",
            LoxMergeWarning,
            stacklevel=2,
        )


_ONE_BY_ONE = "; they were edited one by one, and may differ in their last bits from a run with more memory"


def _described(batch: Batch) -> str:
    first = f"{batch.members[0].name} ({list(batch.shape)})"
    others = len(batch.members) - 1
    return f"{first} and {others} more of this shape" if others else first
