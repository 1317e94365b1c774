"""`harden --dry-run` on two checkpoints of 1,000 files each, and the `--help` of every command: CPU and wall time, medians.

Headers are real, weights are holes: 671B has DeepSeek-V3's names and shapes in bf16, 671B-fine twice as many experts of half the size, which
makes as many tensors as DeepSeek-V3 has with its scales. The dry run is told that the disk has room for the output; it has not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shapes import MODELS
from sparse import disk_bytes, make_sparse_pair

from lox_merge.cli.main import _COMMANDS

_ROOMY = """
import shutil, sys
from collections import namedtuple
usage = namedtuple("usage", "total used free")
shutil.disk_usage = lambda path: usage(10**13, 0, 10**13)
from lox_merge.cli.main import main
main(sys.argv[1:])
"""
_PROFILED = """
import cProfile, pstats
profile = cProfile.Profile()
profile.enable()
try:
    main(sys.argv[1:])
finally:
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)
"""


def timed(command: list[str], repeat: int) -> dict[str, float]:
    """Medians: wall seconds, CPU seconds (user and system), and the largest resident memory of all runs in bytes."""
    walls, cpus = [], []
    for _ in range(repeat):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        walls.append(time.perf_counter() - started)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"seconds": statistics.median(walls), "cpu_seconds": statistics.median(cpus), "fastest": min(walls), "least_cpu": min(cpus)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="show where the time goes, once for each model")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report: dict[str, Any] = {"load": [os.getloadavg()[0]], "files": arguments.files, "models": {}, "help": {}}
    imports = timed([sys.executable, "-c", "import torch"], arguments.repeat)
    report["import_torch"] = imports
    print(f"load average {report['load'][0]:.1f}; import torch alone: CPU {imports['cpu_seconds']:.2f} s, wall {imports['seconds']:.2f} s")
    for name in ("671B", "671B-fine"):
        model = MODELS[name]
        with tempfile.TemporaryDirectory() as folder:
            pair = make_sparse_pair(Path(folder) / "pair", model, arguments.files)
            job = ["harden", *map(str, pair), str(Path(folder) / "out"), "--dry-run"]
            row = timed([sys.executable, "-c", _ROOMY, *job], arguments.repeat)
            row |= {"tensors": len(model.tensors()), "disk": sum(map(disk_bytes, pair))}
            report["models"][name] = row
            print(f"{name:10s} {row['tensors']:,} tensors in {arguments.files:,} files, twice: CPU {row['cpu_seconds']:.2f} s "
                  f"(least {row['least_cpu']:.2f}), wall {row['seconds']:.2f} s (fastest {row['fastest']:.2f})", flush=True)  # fmt: skip
            if arguments.profile:
                subprocess.run([sys.executable, "-c", _ROOMY.replace("main(sys.argv[1:])\n", "") + _PROFILED, *job], check=True)
    for command in ("", *sorted(_COMMANDS)):
        report["help"][command] = timed([sys.executable, "-m", "lox_merge.cli.main", *([command] if command else []), "--help"], arguments.repeat)
    slowest = max(report["help"], key=lambda name: report["help"][name]["cpu_seconds"])
    figures = report["help"]
    print(f"--help of {len(figures)} commands: CPU {figures['']['cpu_seconds']:.2f} s for lox-merge itself, at most "
          f"{figures[slowest]['cpu_seconds']:.2f} s ({slowest}); wall at most {max(row['seconds'] for row in figures.values()):.2f} s")  # fmt: skip
    report["load"].append(os.getloadavg()[0])
    print(f"load average at the end {report['load'][1]:.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
