"""What an edit of a checkpoint is to the engine: which models it reads, and what it makes of each matrix.

The engine streams tensors of several checkpoints ('roles') and writes one that mirrors the last of them; everything that
one edit does differently from another is behind this interface.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lox_merge.jobs.layout import MatrixView
from lox_merge.jobs.select import TensorPlan
from lox_merge.jobs.triplets import TripletSource
from lox_merge.maths.batched_lanczos import Run
from lox_merge.maths.grid import Grid


class MatrixOutcome(Protocol):
    """What was done to one matrix. bad: NaN and Inf in its deltas (then nothing else holds); changed: whether it was edited."""

    @property
    def label(self) -> str: ...

    @property
    def bad(self) -> int: ...

    @property
    def changed(self) -> bool: ...

    @property
    def computed(self) -> bool:
        """Whether what was written is a result, whose range the edit has looked at; else the stored values were copied."""
        ...

    def to_json(self) -> dict[str, Any]:
        """The manifest's record. Undefined values are null."""
        ...


class Edit(Protocol):
    """One kind of edit with its settings.

    method: its name in the manifest. roles: the checkpoints it reads, in the order of training; the output mirrors the
    last. edits_vectors: whether tensors of one dimension are edited too, as (n, 1) matrices. unchanged: why a tensor is
    copied all the same, for the manifest. requantises: whether a quantised checkpoint's output keeps its form. has_low_rank: whether
    the change of a matrix has a low rank, so that an adapter can hold it.
    """

    @property
    def method(self) -> str: ...

    @property
    def roles(self) -> tuple[str, ...]: ...

    @property
    def edits_vectors(self) -> bool: ...

    @property
    def unchanged(self) -> str: ...

    @property
    def requantises(self) -> bool: ...

    @property
    def has_low_rank(self) -> bool: ...

    def choose(self, tensor: TensorPlan, problems: list[str]) -> TensorPlan:
        """`tensor`, selected for editing, with its settings; or as a copy with the reason. What cannot be done goes to `problems`."""
        ...

    def matrix(
        self,
        sources: Mapping[str, Tensor],
        out: Tensor,
        view: MatrixView,
        tensor: TensorPlan,
        device: torch.device,
        triplets: TripletSource,
        grid: Grid | None = None,
    ) -> MatrixOutcome:
        """Writes one edited matrix into `out`, a view of the output tensor. sources: role to the stored matrix. grid: the values that
        the output can hold where it stays quantised; `out` is float32 then."""
        ...

    def batch(
        self,
        sources: Mapping[str, Tensor],
        out: Tensor,
        members: Sequence[tuple[TensorPlan, MatrixView]],
        device: torch.device,
        triplets: TripletSource,
        run: Run,
    ) -> Sequence[MatrixOutcome]:
        """The same for matrices of one shape and rank rule, (b, d_out, d_in) on `device`. Raises OutOfMemoryError where they are too
        many; then nothing of `out` counts. run: shares the host's part out among threads."""
        ...

    def working_memory(self, shape: tuple[int, int], tensor: TensorPlan) -> int:
        """Upper estimate of the bytes that one matrix takes beside mapped files and its place in the output."""
        ...

    def trial(self, tensor: TensorPlan, base: Tensor, aligned: Tensor) -> None:
        """The work on one matrix of this size with the settings of `tensor`, for an estimate of time."""
        ...

    def tensor_record(self, tensor: TensorPlan) -> dict[str, Any]:
        """What the manifest says of an edited tensor beside its matrices."""
        ...

    def summary(self, tensors: list[dict[str, Any]]) -> dict[str, Any]:
        """The manifest's summary of its own entries."""
        ...
