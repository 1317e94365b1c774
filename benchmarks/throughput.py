"""What one core and the disk of this machine do in a second, stage by stage: the figures that benchmarks/scale.py reckons with.

Arithmetic is one thread's CPU time, so that other work on the machine disturbs it little; the disk is wall time. Medians. About two minutes:
    python benchmarks/throughput.py --json benchmarks/out/throughput.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from synthetic import matrix_pair

from lox_merge.jobs.direct_file import DirectFile
from lox_merge.jobs.work import form_delta
from lox_merge.maths.edits import apply_update, lox_update
from lox_merge.maths.spectral import truncated_svd

# (d_out, d_in): of experts, of latent attention, and of Llamas of 8B and 70B. The largest takes 3.4 GB of memory while it is made.
SHAPES = [(1024, 4096), (2048, 7168), (24576, 1536), (4096, 4096), (4096, 14336), (8192, 8192), (8192, 28672)]
BLOCK = 8  # vectors of a Lanczos block at rank 6
DISK_BYTES = 2**30
CHUNK = 2**22


def cpu_seconds(work: Callable[[], object], repeat: int) -> float:
    """Median CPU time of this thread, after a call that is not counted."""
    work()
    found = []
    for _ in range(repeat):
        started = time.thread_time()
        work()
        found.append(time.thread_time() - started)
    return statistics.median(found)


def wall_seconds(work: Callable[[], object], repeat: int, prepare: Callable[[], object] = lambda: None) -> float:
    found = []
    for _ in range(repeat):
        prepare()
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def matrix(shape: tuple[int, int], rank: int, repeat: int) -> dict[str, Any]:
    """One bf16 pair of this shape: seconds of one core in each stage of its edit."""
    base, aligned = matrix_pair(shape, torch.Generator().manual_seed(0))
    delta = form_delta(base, aligned)[0].clone()
    subspace = truncated_svd(delta, rank)
    update = lox_update(subspace, 1.25)
    out = torch.empty_like(aligned)
    wide = shape[0] <= shape[1]
    rows = torch.randn(BLOCK, min(shape))
    entries = delta.numel()
    row = {
        "shape": list(shape),
        "entries": entries,
        "passes": subspace.certificate.passes,
        "delta_seconds": cpu_seconds(lambda: form_delta(base, aligned), repeat),
        "product_seconds": cpu_seconds(lambda: rows @ (delta if wide else delta.T), repeat),
        "svd_seconds": cpu_seconds(lambda: truncated_svd(delta, rank), repeat),
        "update_seconds": cpu_seconds(lambda: apply_update(aligned, update, out=out), repeat),
        "copy_seconds": cpu_seconds(lambda: out.copy_(aligned), repeat),
    }
    print(
        f"{shape[0]:6d} × {shape[1]:<6d} delta {4 * entries / row['delta_seconds'] / 1e9:5.2f} GB/s of bf16 read   "
        f"product {4 * entries / row['product_seconds'] / 1e9:5.1f} GB/s   SVD {entries / row['svd_seconds'] / 1e6:6.1f} M entries/s "
        f"({row['passes']} passes)   update and rounding {entries / row['update_seconds'] / 1e6:6.1f} M entries/s",
        flush=True,
    )
    return row


def hashing(repeat: int) -> float:
    data = bytes(2**26)
    return len(data) / cpu_seconds(lambda: hashlib.sha256(data).digest(), repeat)


def disk(folder: Path, repeat: int) -> dict[str, float]:
    """Bytes per second: writing with fsync as the engine does, reading what the page cache holds, and what it was told to let go; moved_by_core:
    per second of one core's time that it takes to bring them from the disk to a process, or from a process to the disk."""
    data = memoryview(os.urandom(CHUNK))
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        descriptor = file.fileno()

        def write() -> None:
            with DirectFile(Path(file.name)) as written:
                for begin in range(0, DISK_BYTES, CHUNK):
                    written.write(data, begin)
                written.flush()
                written.sync()

        def read() -> None:
            os.lseek(descriptor, 0, os.SEEK_SET)
            while os.read(descriptor, CHUNK):
                pass

        def read_cold() -> None:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            read()

        writing = wall_seconds(write, repeat, lambda: os.ftruncate(descriptor, 0))
        warm = wall_seconds(read, repeat)
        cold = wall_seconds(read_cold, repeat)
        moved = cpu_seconds(read_cold, repeat) + cpu_seconds(write, 1)
    return {"write": DISK_BYTES / writing, "read_warm": DISK_BYTES / warm, "read_cold": DISK_BYTES / cold, "moved_by_core": 2 * DISK_BYTES / moved}


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "out", help="folder on the disk that is measured")
    parser.add_argument("--rank", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--largest", type=float, default=3e8, help="leave out shapes with more entries")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    loads = [os.getloadavg()[0]]
    report: dict[str, Any] = {"machine": machine(), "rank": arguments.rank, "sha256": hashing(arguments.repeat)}
    print(f"{report['machine']}; load average {loads[0]:.1f}\nsha256 {report['sha256'] / 1e9:.2f} GB/s", flush=True)
    report["disk"] = disk(arguments.work, arguments.repeat)
    print("disk " + ", ".join(f"{name.replace('_', ' ')} {speed / 1e9:.2f} GB/s" for name, speed in report["disk"].items()), flush=True)
    chosen = [shape for shape in SHAPES if shape[0] * shape[1] <= arguments.largest]
    report["shapes"] = [matrix(shape, arguments.rank, arguments.repeat) for shape in chosen]
    loads.append(os.getloadavg()[0])
    report["load"] = loads
    print(f"load average at the end {loads[1]:.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
