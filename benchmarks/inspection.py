"""`lox-merge inspect` with one fine-tuned model against `lox-merge harden` on the same synthetic 468M-parameter pair: time and memory.

Limit: 2.5 times harden's time, harden's memory (1 GB and three times the largest tensor in float32).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from measure import Measured, run_command
from synthetic import SIZES, make_finetuned, make_pair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--size", default="468M", choices=list(SIZES))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of the programs")
    parser.add_argument("--full-spectrum", action="store_true", help="measure that too: minutes")
    arguments = parser.parse_args()
    base, aligned = make_pair(arguments.work / arguments.size, arguments.size)
    finetuned = make_finetuned(aligned, arguments.work / arguments.size / "finetuned")
    out = arguments.work / "out"
    program = [sys.executable, "-m", "lox_merge.cli.main"]
    inspect = [*program, "inspect", str(base), str(aligned), str(finetuned)]
    commands = {"harden": [*program, "harden", str(base), str(aligned), str(out)], "inspect": inspect}
    if arguments.full_spectrum:
        commands["inspect --full-spectrum"] = [*inspect, "--full-spectrum"]
    found: dict[str, list[Measured]] = {name: [] for name in commands}
    for _ in range(arguments.repeat):  # in turn, so that what else the machine does meets all of them
        for name, command in commands.items():
            once = run_command(command, prepare=lambda: shutil.rmtree(out, ignore_errors=True), repeat=1, threads=arguments.threads)
            found[name].append(once)
            print(f"{name:24s} {once.seconds:7.1f} s   peak anonymous {once.peak_anonymous / 1e9:.2f} GB", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    seconds = {name: sorted(run.seconds for run in runs)[len(runs) // 2] for name, runs in found.items()}
    for name in commands:
        print(f"{name}: {seconds[name] / seconds['harden']:.2f} times harden, peak {max(run.peak_anonymous for run in found[name]) / 1e9:.2f} GB")
    (arguments.work / "inspection.json").write_text(json.dumps({"size": arguments.size, "seconds": seconds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
