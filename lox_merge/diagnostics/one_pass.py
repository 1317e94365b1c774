"""One pass over the shards: each tensor of every model is read once, matrices are measured ahead by a bounded crew of threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lox_merge.diagnostics.measures import Measures, measure
from lox_merge.diagnostics.settings import InspectSettings
from lox_merge.diagnostics.sources import Compared, Sources
from lox_merge.errors import NumericalError
from lox_merge.jobs.device_memory import on_cpu_where_too_large
from lox_merge.jobs.engine import Progress
from lox_merge.jobs.factors import Factors
from lox_merge.jobs.in_flight import InFlight, in_order
from lox_merge.jobs.layout import MatrixView
from lox_merge.jobs.noise import RoundingNoise, noise_between
from lox_merge.jobs.work import IN_FLIGHT_BYTES, Crew, CrewSize, form_delta, working_memory
from lox_merge.maths.geometry import Products, inner_products
from lox_merge.maths.precision import frobenius_norm
from lox_merge.maths.rank import RankRule


@dataclass(frozen=True)
class Matrix:
    """A measured matrix and where it is from."""

    tensor: Compared
    view: MatrixView
    measures: Measures

    @property
    def label(self) -> str:
        return self.tensor.name + self.view.label

    @property
    def kind(self) -> str:
        """The tensor's; with 'gate' or 'up' where the matrix is that half of it."""
        part = self.view.label.rpartition("]")[2]
        return self.tensor.kind + part

    @property
    def entries(self) -> int:
        return self.view.shape[0] * self.view.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        rows, columns = self.view.shape
        return (columns, rows) if self.tensor.transposed else (rows, columns)


@dataclass(frozen=True)
class Vector:
    """A tensor of fewer than two dimensions: products with each fine-tuned model's update (or Δ_align alone, with none)."""

    tensor: Compared
    weight_norm: float
    norm: float
    updates: tuple[Products, ...]
    bad: tuple[int, ...] = ()


@dataclass(frozen=True)
class Measured:
    """Everything that one pass gave, in the order of the files. left_out: labels of what held NaN or Inf."""

    matrices: list[Matrix]
    vectors: list[Vector]
    left_out: list[str]


def measure_all(sources: Sources, settings: InspectSettings, device: torch.device, progress: Progress, factors: Factors | None = None) -> Measured:
    """Reads and measures everything. Raises NumericalError that names every tensor with NaN or Inf, unless those are to be skipped."""
    matrices, vectors = list[Matrix](), list[Vector]()
    bad: dict[str, tuple[int, ...]] = {}
    crew = Crew(device, CrewSize.of(device, _typical_bytes(sources, settings)))
    try:
        with crew.threads():
            for tensor, found in _in_order(sources, settings, crew, factors):
                if isinstance(found, Vector):
                    label, counts = tensor.name, found.bad
                    if not any(counts):
                        vectors.append(found)
                else:
                    label, counts = found.label, found.measures.bad
                    if not any(counts):
                        matrices.append(found)
                if any(counts):
                    bad[label] = counts
                progress.advance(sources.bytes_of(tensor) // max(1, len(tensor.views)))
    finally:
        crew.close()
    if bad and not settings.skip_non_finite:
        raise _non_finite(bad, sources)
    return Measured(matrices, vectors, list(bad))


def _in_order(sources: Sources, settings: InspectSettings, crew: Crew, factors: Factors | None) -> Iterator[tuple[Compared, Matrix | Vector]]:
    """Results in the order of the files; matrices are measured ahead while the memory budget allows."""
    waiting = deque((tensor, view) for tensor in sources.tensors for view in tensor.views or (None,))
    started: deque[tuple[tuple[Compared, MatrixView | None], Future[Measures | Vector]]] = deque()
    costs = [_bytes(view, settings) + sources.made_bytes(tensor) for tensor in sources.tensors for view in tensor.views]
    in_flight = InFlight(IN_FLIGHT_BYTES + max(costs, default=0))

    def begin_more() -> None:
        while waiting:
            tensor, view = waiting[0]
            cost = 0 if view is None else _bytes(view, settings) + sources.made_bytes(tensor)
            if started and (cost > in_flight.room or len(started) > 4 * crew.workers + 8):
                return
            waiting.popleft()
            stored = list(_stored(tensor, sources))  # opened here: files are not opened by two threads at once
            future: Future[Any]
            if view is None:
                future = crew.submit(_measure_vector, tensor, stored)
            else:
                noises = _noises(tensor, view, sources)
                future = crew.submit(_measure_matrix, tensor, view, stored, noises, settings, crew.device, factors)
            in_flight.watch(future, cost)
            started.append(((tensor, view), future))

    for (tensor, view), result in in_order(started, in_flight, begin_more):
        if isinstance(result, Vector):
            yield tensor, result
        else:
            assert view is not None
            yield tensor, Matrix(tensor, view, result)


def _measure_matrix(
    tensor: Compared,
    view: MatrixView,
    stored: list[Tensor],
    noises: list[RoundingNoise],
    settings: InspectSettings,
    device: torch.device,
    factors: Factors | None,
) -> Measures:
    base, aligned, *others = (view.select(values) for values in stored)
    label = tensor.name + view.label
    known = None
    if factors is not None and (tensor.name, view.label) in factors:
        known = factors.subspace(tensor.name, view.label), factors.matrices[tensor.name, view.label].complete

    def measured(device: torch.device) -> Measures:
        transposed = tensor.transposed
        return measure(base, aligned, others, settings, label=label, transposed=transposed, device=device, noises=noises, known=known)

    try:
        return on_cpu_where_too_large(measured, device, f"{label} ({list(view.shape)})", "measured")
    except NumericalError as error:
        raise NumericalError(f"tensor {label}: {error}.") from error


def _measure_vector(tensor: Compared, stored: list[Tensor]) -> Vector:
    base, aligned, *others = (values.reshape(1, -1) for values in stored)
    try:
        return _products(tensor, base, aligned, others)
    except NumericalError as error:
        raise NumericalError(f"tensor {tensor.name}: {error}.") from error


def _products(tensor: Compared, base: Tensor, aligned: Tensor, others: Sequence[Tensor]) -> Vector:
    delta, norm, bad = form_delta(base, aligned)
    counts, updates = [bad], list[Products]()
    for other in others:
        change, size, bad = form_delta(aligned, other, slot=1)
        counts.append(bad)
        product, total = inner_products(delta, change, 1)
        updates.append(Products(norm**2, size**2, product, total**2))
    return Vector(tensor, frobenius_norm(aligned), norm, tuple(updates), tuple(counts))


def _stored(tensor: Compared, sources: Sources) -> Iterator[Tensor]:
    yield sources.base.tensor(tensor.base_name)
    yield sources.aligned.tensor(tensor.name)
    for (_, model), name in zip(sources.finetuned, tensor.names, strict=True):
        yield model.tensor(name)


def _noises(tensor: Compared, view: MatrixView, sources: Sources) -> list[RoundingNoise]:
    """Of aligned − base, then of every fine-tuned model − aligned."""
    aligned = (sources.aligned, tensor.name)
    later = zip((model for _, model in sources.finetuned), tensor.names, strict=True)
    return [noise_between((sources.base, tensor.base_name), aligned, view), *(noise_between(aligned, model, view) for model in later)]


def _bytes(view: MatrixView, settings: InspectSettings) -> int:
    """Upper estimate of the memory that measuring one matrix takes beside mapped files: two deltas, and two subspaces at a time."""
    short, long = sorted(view.shape)
    count = settings.triplets_of(short)
    subspace = 4 * count * (short + long)
    drawn = 4 * settings.draws * settings.rank_of(short) * (short + 2 * long)
    overlap = 8 * count * count
    return working_memory(view.shape, RankRule("fixed", count)) + 4 * short * long + 4 * subspace + drawn + overlap


def _typical_bytes(sources: Sources, settings: InspectSettings) -> int:
    """Memory of the matrix in the middle of the work: what the crew's size is chosen for."""
    costs = sorted(_bytes(view, settings) + sources.made_bytes(tensor) for tensor in sources.tensors for view in tensor.views)
    total, half = 0, sum(costs) / 2
    for cost in costs:
        total += cost
        if total >= half:
            return cost
    return 1


def _non_finite(bad: dict[str, tuple[int, ...]], sources: Sources) -> NumericalError:
    deltas = [f"aligned ({sources.aligned.title}) − base"] + [f"{label} − aligned" for label, _ in sources.finetuned]
    named = []
    for label, counts in list(bad.items())[:8]:
        named.append(f"{label}: " + ", ".join(f"{count:,} in {delta}" for count, delta in zip(counts, deltas, strict=False) if count))
    more = f"; and {len(bad) - 8} more" if len(bad) > 8 else ""
    return NumericalError(
        f"NaN or Inf in the deltas of {len(bad)} matrices or vectors: {'; '.join(named)}{more}. One of the checkpoints is damaged or "
        "overflowed. Repair it, or pass --skip-non-finite to leave these out."
    )
