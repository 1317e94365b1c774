"""What a batch of matrices costs on a device, stage by stage, and a whole model streamed through the pipeline."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from synthetic import make_outline
from torch import Tensor

from lox_merge import Recipe
from lox_merge.jobs.batches import Batch, batch_bytes, batches_of
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.pipeline import EDITORS, Pipeline
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.transfers import Transfers, mark_here
from lox_merge.jobs.triplets import TakenNow
from lox_merge.jobs.work import form_deltas
from lox_merge.maths.batched_spectral import batched_rank, batched_truncated_svd
from lox_merge.maths.edits import lox_edit
from lox_merge.maths.rank import RankRule
from lox_merge.maths.spectral import truncated_svd
from lox_merge.maths.thin_products import fast_kernels

Kind = tuple[tuple[int, int], int]


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device, repeat: int = 3) -> float:
    """Mean wall time of a call after a warm-up, with everything done that it asked for."""
    work()
    settle(device)
    started = time.perf_counter()
    for _ in range(repeat):
        work()
    settle(device)
    return (time.perf_counter() - started) / repeat


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy within the device, read plus written."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device, 10)


def disk(folder: Path, size: int) -> tuple[float, float]:
    """Bytes per second of writing with fsync, and of reading back with the file out of the page cache where the system lets it go."""
    data = torch.randint(0, 255, (size,), dtype=torch.uint8).numpy().data
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - started
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        with Path(file.name).open("rb", buffering=0) as opened:
            while opened.read(2**26):
                pass
        return size / written, size / (time.perf_counter() - started)


def outline(folder: Path, size: str, rank: int) -> Plan:
    return plan_hardening(*make_outline(folder / size, size), folder / "out", recipe=Recipe(rank=rank))


def pair(shape: tuple[int, int], device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A bf16 pair in host memory: 64 directions of singular values i^-0.8 and rounding noise, as benchmarks/synthetic.py makes."""
    generator = torch.Generator(device=device).manual_seed(seed)
    rows, columns = shape

    def normal(*sides: int) -> Tensor:
        return torch.randn(*sides, generator=generator, device=device)

    base = (normal(rows, columns) * 0.02).bfloat16()
    low = (normal(rows, 64) * torch.arange(1, 65, device=device).float() ** -0.8) @ normal(64, columns)
    low *= 0.006 * torch.linalg.vector_norm(base, dtype=torch.float32) / low.norm()
    aligned = low.add_(normal(rows, columns), alpha=8e-5).add_(base).bfloat16()
    return base.cpu(), aligned.cpu()


def products(shapes: Iterable[tuple[int, int, int]], width: int, device: torch.device) -> list[dict[str, Any]]:
    """Bytes per second at which matrices (b, d_out, d_in) are read by products with `width` rows, by torch and by the kernels, to either side."""
    found = []
    for count, rows, columns in shapes:
        matrices = torch.randn(count, rows, columns, device=device)
        for name, stored in (("to columns", matrices), ("to rows", matrices.mT)):
            thin = torch.randn(count, width, stored.shape[1], device=device)
            out = torch.empty(count, width, stored.shape[2], device=device)
            rate: dict[str, Any] = {"shape": [count, rows, columns], "side": name}
            rate["torch"] = 4 * matrices.numel() / seconds(partial(torch.bmm, thin, stored, out=out), device, 10)
            fast = fast_kernels(device)
            if fast is not None:
                address = torch.tensor([matrices.data_ptr()], device=device)
                rate["kernels"] = 4 * matrices.numel() / seconds(partial(fast.rows_times, thin, stored, out, address), device, 10)
            found.append(rate)
    return found


class Weights:
    """A generator in the place of files: two pairs of each shape, one of the very large ones, for any number of matrices."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._made = device, dict[tuple[tuple[int, int], int], tuple[Tensor, Tensor]]()

    def of(self, batch: Batch) -> list[dict[str, Tensor]]:
        variants = 2 if batch.shape[0] * batch.shape[1] < 2**27 else 1
        keys = [(batch.shape, place % variants) for place in range(len(batch.members))]
        for key in keys:
            if key not in self._made:
                self._made[key] = pair(batch.shape, self._device, key[1])
        return [dict(zip(("base", "aligned"), self._made[key], strict=True)) for key in keys]


@dataclass(frozen=True)
class Stage:
    """Seconds of one batch in each stage. passes: products with its matrices, of all together."""

    up: float
    delta: float
    svd: float
    update: float
    down: float
    passes: int


def kinds(plan: Plan) -> Counter[Kind]:
    """How often batches of each shape and number occur."""
    return Counter((batch.shape, len(batch.members)) for position in range(len(plan.shards)) for batch in batches_of(plan, position))


def measure(plan: Plan, batch: Batch, weights: Weights, device: torch.device, run: Any, repeat: int) -> Stage:
    """Every stage of one batch by itself: nothing overlaps here."""
    sources, members = weights.of(batch), len(batch.members)
    stacked = {role: torch.empty((members, *batch.shape), dtype=torch.bfloat16, device=device) for role in ("base", "aligned")}
    out = torch.empty_like(stacked["base"])
    fetched = [torch.empty(batch.shape, dtype=torch.bfloat16) for _ in range(members)]
    rule, tolerance = _rule(batch), plan.recipe.tolerance
    up, down = Transfers(device), Transfers(device)

    def upload() -> None:
        up.upload((matrix, stacked[role][place]) for place, roles in enumerate(sources) for role, matrix in roles.items()).wait()

    def decompose() -> Any:
        if batched_rank(batch.shape, rule) is None:
            return [truncated_svd(matrix, rule, tolerance=tolerance) for matrix in deltas]
        return batched_truncated_svd(deltas, rule, norms=norms, tolerance=tolerance, run=run)

    def update() -> None:
        for place, subspace in enumerate(subspaces):
            matrices = stacked["base"][place], stacked["aligned"][place]
            lox_edit(*matrices, rule, 1.25, delta=deltas[place], subspace=subspace, out=out[place])

    try:
        uploading = seconds(upload, device, repeat)
        deltas, norms, _ = form_deltas(stacked["base"], stacked["aligned"])
        forming = seconds(lambda: form_deltas(stacked["base"], stacked["aligned"]), device, repeat)
        subspaces = decompose()
        stage = Stage(
            up=uploading,
            delta=forming,
            svd=seconds(decompose, device, repeat),
            update=seconds(update, device, repeat),
            down=seconds(lambda: down.download(zip(out, fetched, strict=True), after=mark_here(device)), device, repeat),
            passes=sum(subspace.certificate.passes for subspace in subspaces),
        )
    finally:
        up.close()
        down.close()
    return stage


def svds_together(plan: Plan, weights: Weights, device: torch.device, run: Any) -> tuple[float, float]:
    """Seconds of every SVD of a model, as many at a time as the pipeline takes, each in a stream of its own; deltas are there before.
    Twice: at first each shape is made ready, with memory and recorded steps, and then no more."""
    batches = [batch for position in range(len(plan.shards)) for batch in batches_of(plan, position)]
    deltas: dict[Kind, tuple[Tensor, list[float]]] = {}
    for batch in batches:
        kind = batch.shape, len(batch.members)
        if kind not in deltas and batched_rank(batch.shape, _rule(batch)) is not None:
            stacked = [torch.stack([roles[role] for roles in weights.of(batch)]).to(device) for role in ("base", "aligned")]
            deltas[kind] = form_deltas(*stacked)[:2]
            del stacked
    own = threading.local()

    def decompose(batch: Batch) -> None:
        given, norms = deltas[batch.shape, len(batch.members)]
        if device.type != "cuda":
            batched_truncated_svd(given, _rule(batch), norms=norms, tolerance=plan.recipe.tolerance, run=run)
            return
        if not hasattr(own, "stream"):
            own.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(own.stream):
            batched_truncated_svd(given, _rule(batch), norms=norms, tolerance=plan.recipe.tolerance, run=run)

    todo = [batch for batch in batches if (batch.shape, len(batch.members)) in deltas]
    taken = []
    with ThreadPoolExecutor(EDITORS) as pool:
        for _ in range(2):
            settle(device)
            started = time.perf_counter()
            list(pool.map(decompose, todo))
            settle(device)
            taken.append(time.perf_counter() - started)
    deltas.clear()
    return taken[0], taken[1]


def _rule(batch: Batch) -> RankRule:
    rule = batch.members[0].tensor.rank
    assert rule is not None
    return rule


def stream(plan: Plan, weights: Weights, device: torch.device) -> tuple[float, int | None]:
    """Seconds of the whole model through the pipeline, sources from the generator, results dropped: everything overlaps but the disk.
    And the peak of the device's memory meanwhile, bytes."""
    pipeline = Pipeline(device)
    running: deque[tuple[Future[Any], int]] = deque()
    triplets = TakenNow(plan.recipe.tolerance, plan.recipe.seed)
    batches = [batch for position in range(len(plan.shards)) for batch in batches_of(plan, position)]
    for batch in batches:
        weights.of(batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # making the weights took more
    started = time.perf_counter()
    try:
        for batch in batches:
            needed = batch_bytes(plan, batch)
            while running and (len(running) == pipeline.depth or sum(size for _, size in running) + needed > pipeline.budget):
                running.popleft()[0].result()
            outs = [torch.empty(batch.shape, dtype=torch.bfloat16) for _ in batch.members]
            fits = needed <= pipeline.budget
            running.append((pipeline.submit(plan.edit, triplets, batch, weights.of(batch), outs, together=fits), needed))
        for future in _drained(running):
            future.result()
    finally:
        pipeline.close()
    return time.perf_counter() - started, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _drained(running: deque[tuple[Future[Any], int]]) -> Iterator[Future[Any]]:
    while running:
        yield running.popleft()[0]
