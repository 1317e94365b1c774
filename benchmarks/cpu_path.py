"""The CPU path, part by part: each choice of the engine beside what it was chosen over. Interleaved, medians.

python benchmarks/cpu_path.py --json cpu_path.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lox_merge.jobs.direct_file import DirectFile
from lox_merge.jobs.work import form_delta
from lox_merge.maths import lanczos, truncated_svd
from lox_merge.maths.edits import apply_update, lox_update
from lox_merge.maths.pieces import PIECE, rows_at_once
from lox_merge.maths.rank import RankRule
from lox_merge.maths.update import Update, UpdateRows

SHAPES = [(1024, 1024), (4096, 1024), (1024, 4096), (4096, 4096), (4096, 14336)]
WIDTHS = (8, 12, 16, 24)
FILE_BYTES = 2**30


def interleaved(programs: dict[str, Callable[[], object]], repeat: int = 7) -> dict[str, float]:
    """Median wall seconds of each, run in turn so that what else the machine does falls on all of them."""
    for work in programs.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeat):
        for name, work in programs.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def pair(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
    values = torch.arange(1, 65).float() ** -0.8
    low = (torch.randn(shape[0], 64, generator=generator) * values) @ torch.randn(64, shape[1], generator=generator)
    low *= 0.006 * base.float().norm() / low.norm()
    return base, (base.float() + low + torch.randn(shape, generator=generator) * 8e-5).bfloat16()


def deltas() -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        base, aligned = pair(shape)
        found = interleaved({"in pieces": lambda: form_delta(base, aligned), "at once": lambda: aligned.float().sub_(base).norm()})  # noqa: B023
        rows.append({"shape": shape, **found})
        print(f"delta {shape!s:15s} " + per_entry(found, shape))
    return rows


def updates() -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        base, aligned = pair(shape)
        update = lox_update(truncated_svd(aligned.float() - base.float(), 6), 1.25)
        out = torch.empty_like(aligned)

        def whole() -> float:
            dense = update.left @ update.right.T  # type: ignore[operator, union-attr]  # noqa: B023
            out.copy_(aligned.float() + dense)  # noqa: B023
            kept = out.float() - aligned.float()  # noqa: B023
            return float((kept * dense).sum()) / float(kept.norm() * dense.norm())

        found = interleaved({"in pieces": lambda: apply_update(aligned, update, out=out), "at once": whole})  # noqa: B023
        rows.append({"shape": shape, **found})
        print(f"update {shape!s:14s} " + per_entry(found, shape))
    return rows


def products() -> list[dict[str, Any]]:
    """Adding thin factors to wide pieces and judging what was kept: as the engine does it, and with small pieces and transposed factors."""
    rows = []
    for columns in (4096, 11008, 28672):
        for rank in (6, 64, 256):
            whole = torch.randn(64, columns)
            update = Update(torch.randn(64, rank), torch.randn(columns, rank))
            small = PIECE // columns
            pieces = {
                "as the engine": (rows_at_once(whole, rank), update.in_pieces(rows_at_once(whole, rank), whole.dtype)),
                "transposed": (small, [UpdateRows(left=part, right=update.right.T) for part in torch.split(update.left, small)]),  # type: ignore[union-attr, arg-type]
            }

            def work(step: int, parts: list[UpdateRows]) -> None:
                for part, change in zip(torch.split(whole, step), parts, strict=True):  # noqa: B023
                    change.inner_product(change.added_to(part))

            found = interleaved({name: lambda chosen=chosen: work(*chosen) for name, chosen in pieces.items()})  # type: ignore[misc]
            rows.append({"columns": columns, "rank": rank, **found})
            print(f"products {columns:5d} columns, rank {rank:3d}  " + per_entry(found, (64, columns)))
    return rows


def blocks(rank: int) -> list[dict[str, Any]]:
    """Lanczos with blocks of other widths; passes are products with the delta."""
    rows = []
    for shape in SHAPES:
        base, aligned = pair(shape)
        delta = aligned.float() - base.float()
        norm = float(delta.norm())

        def solve(width: int) -> lanczos.LanczosResult:
            before = lanczos.SMALL_BLOCK, lanczos.BLOCK
            lanczos.SMALL_BLOCK = lanczos.BLOCK = width
            try:
                rule = RankRule("fixed", rank)
                # SMALL_BLOCK serves ranks up to itself, and both are the same here.
                return lanczos.block_lanczos(delta, rule, norm=norm, noise_edge=0.0, tolerance=1e-3, seed=0, largest_rank=min(delta.shape) // 5)  # noqa: B023
            finally:
                lanczos.SMALL_BLOCK, lanczos.BLOCK = before

        passes = {width: solve(width).triplets.passes for width in WIDTHS}
        found = interleaved({str(width): lambda width=width: solve(width) for width in WIDTHS}, repeat=5)  # type: ignore[misc]
        rows.append({"shape": shape, "rank": rank, "passes": passes, **found})
        print(f"rank {rank} {shape!s:15s} " + "  ".join(f"b={width} {found[str(width)] * 1e3:7.1f} ms ({passes[width]} passes)" for width in WIDTHS))
    return rows


def reading(folder: Path) -> dict[str, float]:
    """A file in the page cache to float32, piece by piece: mapped, mapped and announced, populated, or read into a buffer."""
    path = folder / "source"
    path.write_bytes(os.urandom(2**20) * (FILE_BYTES // 2**20))
    piece = torch.empty(PIECE)

    def mapped(advice: int | None) -> None:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
            if advice is not None:
                memory.madvise(advice)
            values = torch.frombuffer(memory, dtype=torch.bfloat16)
            for part in torch.split(values, PIECE):
                piece.copy_(part)
            del part, values

    def read() -> None:
        buffer = bytearray(2 * PIECE)
        values = torch.frombuffer(buffer, dtype=torch.bfloat16)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                piece.copy_(values)

    found = interleaved(
        {
            "mapped": lambda: mapped(None),
            "MADV_SEQUENTIAL": lambda: mapped(mmap.MADV_SEQUENTIAL),
            "MADV_POPULATE_READ": lambda: mapped(22),  # Linux 5.14; the module has no name for it before Python 3.14
            "read()": read,
        },
        repeat=5,
    )
    print("reading     " + "  ".join(f"{name} {FILE_BYTES / seconds / 1e9:.2f} GB/s" for name, seconds in found.items()))
    return found


def writing(folder: Path) -> dict[str, float]:
    """1 GB to the disk with fsync, in pieces of 8 MB: past the page cache, as the engine does, or through it: as it comes, its room asked for
    first, or handed to the disk as it comes. Wall and CPU seconds."""
    path, data = folder / "target", os.urandom(2**23)

    def directly() -> None:
        path.unlink(missing_ok=True)
        with DirectFile(path) as file:
            for start in range(0, FILE_BYTES, len(data)):
                file.write(data, start)
            file.flush()
            file.sync()

    def write(how: str) -> None:
        path.unlink(missing_ok=True)
        with path.open("wb", buffering=0) as file:
            if how == "posix_fallocate":
                os.posix_fallocate(file.fileno(), 0, FILE_BYTES)
            for start in range(0, FILE_BYTES, len(data)):
                file.write(data)
                if how == "fsync on the way" and start % 2**28 == 0:
                    os.fdatasync(file.fileno())
            os.fsync(file.fileno())

    through = ("as it comes", "posix_fallocate", "fsync on the way")
    programs: dict[str, Callable[[], object]] = {"past the page cache": directly, **{how: lambda how=how: write(how) for how in through}}  # type: ignore[misc]
    cpu: dict[str, list[float]] = {name: [] for name in programs}

    def timed(name: str, work: Callable[[], object]) -> None:
        started = time.process_time()
        work()
        cpu[name].append(time.process_time() - started)

    found = interleaved({name: lambda name=name, work=work: timed(name, work) for name, work in programs.items()}, repeat=5)  # type: ignore[misc]
    path.unlink()
    for name, seconds in found.items():
        print(f"writing     {name:20s} {FILE_BYTES / seconds / 1e9:.2f} GB/s, {statistics.median(cpu[name]):.2f} s of CPU")
    return found | {f"{name}, CPU": statistics.median(seconds) for name, seconds in cpu.items()}


def hashing() -> dict[str, float]:
    data = os.urandom(2**26)
    found = interleaved({"sha256": lambda: hashlib.sha256(data).digest()})
    print(f"sha256      {len(data) / found['sha256'] / 1e9:.2f} GB/s")
    return found


def per_entry(found: dict[str, float], shape: tuple[int, int]) -> str:
    return "  ".join(f"{name} {seconds / (shape[0] * shape[1]) * 1e9:5.2f} ns an entry" for name, seconds in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {"threads": arguments.threads, "load": os.getloadavg()[0]}
    report["deltas"], report["updates"] = deltas(), updates()
    report["products"] = products()
    report["blocks"] = blocks(6) + blocks(32)
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        report["reading"], report["writing"] = reading(Path(folder)), writing(Path(folder))
    report["hashing"] = hashing()
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
