"""One worker of one core against two: `harden --workers` on a synthetic pair whose time is arithmetic, not the disk.

Whole programs, start included; the two are run in turn, medians are compared, and so are the bytes they wrote. The default job is one of
468 million parameters at rank 64, where starting up is a small part: about ten minutes. `--executor ray` has workers of a Ray that each
run starts for itself. `--size tiny` shows what starting up takes by itself. Needs a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
from pathlib import Path

from measure import run_command
from synthetic import SIZES, make_pair

HERE = Path(__file__).parent
WORKERS = (1, 2)


def digest(folder: Path) -> str:
    """sha256 of all files of an output."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def command(base: Path, aligned: Path, out: Path, rank: str, workers: int, executor: str, cores: list[int]) -> list[str]:
    """`harden` on as many cores as workers. A single worker that is a process is the program itself."""
    job = [sys.executable, "-m", "lox_merge.cli.main", "harden", base, aligned, out, "--rank", rank, "--workers", workers, "--executor", executor]
    return ["taskset", "-c", ",".join(map(str, cores[:workers])), *map(str, job)]


def processor_seconds() -> float:
    """Of all programs that ended and were waited for; Ray's workers are not among them."""
    times = os.times()
    return times.children_user + times.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "out")
    parser.add_argument("--size", choices=SIZES, default="468M")
    parser.add_argument("--rank", default="64")
    parser.add_argument("--executor", choices=("processes", "ray"), default="processes")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    base, aligned = make_pair(arguments.work / arguments.size, arguments.size)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < max(WORKERS):
        parser.error(f"{max(WORKERS)} cores are needed, this process may use {len(cores)}")
    seconds: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    processor: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    found = set()
    for _ in range(arguments.repeat):
        for workers in WORKERS:
            out = arguments.work / "out"
            shutil.rmtree(out, ignore_errors=True)
            before = processor_seconds()
            spell = run_command(command(base, aligned, out, arguments.rank, workers, arguments.executor, cores), repeat=1, threads=1).seconds
            seconds[workers].append(spell)
            processor[workers].append(processor_seconds() - before)
            found.add(digest(out))
            load = os.getloadavg()[0]
            print(f"{workers} worker(s) on {workers} core(s): {spell:.1f} s, {processor[workers][-1]:.1f} of a core (load {load:.1f})", flush=True)
            shutil.rmtree(out)
    medians = {workers: statistics.median(spells) for workers, spells in seconds.items()}
    report = {
        "size": arguments.size,
        "rank": arguments.rank,
        "executor": arguments.executor,
        "seconds": seconds,
        "processor_seconds": processor,
        "ratio": medians[1] / medians[2],
        "same_bytes": len(found) == 1,
    }
    print(f"two workers are {report['ratio']:.2f} times as fast as one; the bytes are {'the same' if len(found) == 1 else 'NOT THE SAME'}")
    (arguments.work / f"executors-{arguments.executor}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
