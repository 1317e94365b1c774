"""`make bench`: harden against its peers on synthetic pairs, one run, medians; ratios are what counts.

Writes benchmarks/out/harden.json and prints a table. Takes about ten minutes and 12 GB of disk; --wide adds two layers of 7B shape
(full SVD of them takes minutes).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from measure import Measured, run_command
from synthetic import SIZES, make_pair

HERE = Path(__file__).parent
TASK_ARITHMETIC = """\
merge_method: task_arithmetic
base_model: {base}
models:
  - model: {aligned}
    parameters: {{weight: 2.0}}
dtype: bfloat16
"""


# Two layers of 7B shape, with embedding and head.
WIDE = "7B-2-layers"
# Programs that take a full SVD of every matrix run once.
FULL_SVD = ("full SVD", "full SVD, whole models", "LoX script")


def measure(size: str, work: Path, repeat: int, *, peers: Sequence[str]) -> dict[str, Measured]:
    """`harden` and its peers on one pair, in turn; each run writes to a folder that is removed before it."""
    base, aligned = make_pair(work / size, size)
    out = work / "out"
    config = work / "task_arithmetic.yaml"
    config.write_text(TASK_ARITHMETIC.format(base=base, aligned=aligned))
    bin_folder = Path(sys.executable).parent
    peer = [sys.executable, str(HERE / "programs.py")]
    pair = [str(base), str(aligned), str(out)]
    programs = {
        "harden": [str(bin_folder / "lox-merge"), "harden", *pair],
        "floor": [*peer, "floor", *pair],
        "mergekit task_arithmetic": [str(bin_folder / "mergekit-yaml"), str(config), str(out), "--allow-crimes", "--no-copy-tokenizer"],
        "full SVD": [*peer, "full_svd", *pair],
        "full SVD, whole models": [*peer, "whole_models", *pair],
        "LoX script": [*peer, "lox_script", *pair],
    }
    found: dict[str, list[Measured]] = {name: [] for name in ("harden", *peers)}
    for turn in range(repeat):
        for name, runs in found.items():
            if turn and name in FULL_SVD:
                continue
            runs.append(run_command(programs[name], prepare=lambda: shutil.rmtree(out, ignore_errors=True), repeat=1))
            print(f"{size:11s} {name:26s} {runs[-1].seconds:7.1f} s   peak anonymous {runs[-1].peak_anonymous / 1e9:.2f} GB", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    return {name: Measured(median(run.seconds for run in runs), max(run.peak_anonymous for run in runs)) for name, runs in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=HERE / "out")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--sizes", nargs="*", default=["117M", "1B"], help="further sizes to show memory on, without peers")
    parser.add_argument("--wide", action="store_true", help="also two layers of 7B shape, against full SVD")
    parser.add_argument("--only-wide", action="store_true", help="nothing but those two layers")
    parser.add_argument("--skip-svd", action="store_true", help="leave out the comparison on one 4096×4096 delta")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = {}
    if not arguments.only_wide:
        results["468M"] = measure("468M", arguments.work, arguments.repeat, peers=("floor", "mergekit task_arithmetic", *FULL_SVD))
        results |= {size: measure(size, arguments.work, arguments.repeat, peers=()) for size in arguments.sizes}
    if arguments.wide or arguments.only_wide:
        results[WIDE] = measure(WIDE, arguments.work, arguments.repeat, peers=("floor", FULL_SVD[-1]))
    ratios = {size: {name: row.seconds / rows["harden"].seconds for name, row in rows.items() if name != "harden"} for size, rows in results.items()}
    limits = {}
    for size, rows in results.items():
        shapes = SIZES[size].tensors()
        largest = max(4 * torch.Size(shape).numel() for _, shape in shapes)
        limits[size] = {"peak_anonymous": rows["harden"].peak_anonymous, "allowed": 10**9 + 3 * largest}
    print()
    for size, found in ratios.items():
        if found:
            print(f"{size}: harden takes 1; " + "; ".join(f"{name} {ratio:.2f}" for name, ratio in found.items()))
    for size, rows in results.items():
        for name in FULL_SVD[1:]:
            if name in rows:
                print(f"{size}: peak anonymous memory is {rows['harden'].peak_anonymous / rows[name].peak_anonymous:.2f} of that of {name}")
    for size, limit in limits.items():
        print(
            f"{size}: peak anonymous {limit['peak_anonymous'] / 1e9:.2f} GB of {limit['allowed'] / 1e9:.2f} GB (1 GB + 3 × largest tensor in float32)"
        )
    report = {
        "seconds": {size: {name: row.seconds for name, row in rows.items()} for size, rows in results.items()},
        "times_of_harden": ratios,
        "memory": limits,
    }
    (arguments.work / "harden.json").write_text(json.dumps(report, indent=2) + "\n")
    if not arguments.skip_svd:
        print()
        subprocess.run([sys.executable, str(HERE / "svd.py"), "--json", str(arguments.work / "svd.json")], check=True)


if __name__ == "__main__":
    main()
