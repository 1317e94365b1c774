"""One worker of one core against two: `harden --workers` on a synthetic pair whose time is arithmetic, not the disk.

Whole programs, start included; the two are run in turn, medians are compared, and so are the bytes they wrote. About five minutes.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=HERE / "out")
    parser.add_argument("--size", choices=SIZES, default="117M")
    parser.add_argument("--rank", default="64")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    base, aligned = make_pair(arguments.work / arguments.size, arguments.size)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < max(WORKERS):
        parser.error(f"{max(WORKERS)} cores are needed, this process may use {len(cores)}")
    seconds: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    found = set()
    for _ in range(arguments.repeat):
        for workers in WORKERS:
            out = arguments.work / "out"
            shutil.rmtree(out, ignore_errors=True)
            taken = ",".join(map(str, cores[:workers]))
            job = [sys.executable, "-m", "lox_merge.cli.main", "harden", base, aligned, out, "--rank", arguments.rank, "--workers", workers]
            spell = run_command(["taskset", "-c", taken, *map(str, job)], repeat=1, threads=1).seconds
            seconds[workers].append(spell)
            found.add(digest(out))
            print(f"{workers} worker(s) on {workers} core(s): {spell:.1f} s (load of the machine {os.getloadavg()[0]:.1f})", flush=True)
            shutil.rmtree(out)
    medians = {workers: statistics.median(spells) for workers, spells in seconds.items()}
    report = {"size": arguments.size, "rank": arguments.rank, "seconds": seconds, "ratio": medians[1] / medians[2], "same_bytes": len(found) == 1}
    print(f"two workers are {report['ratio']:.2f} times as fast as one; the bytes are {'the same' if len(found) == 1 else 'NOT THE SAME'}")
    (arguments.work / "executors.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
