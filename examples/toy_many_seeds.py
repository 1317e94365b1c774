"""The demo over several seeds: means and ranges behind the sentence about seeds 8-15, about half a minute a seed.

python examples/toy_many_seeds.py            # seeds 8 to 15, on which no setting was tuned
python examples/toy_many_seeds.py 0 1 2 --json seeds.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from lox_merge.lab.demo import run_demo
from lox_merge.lab.summary import STAGES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, default=list(range(8, 16)))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    values: dict[str, dict[str, list[float]]] = {}
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            result = run_demo(Path(folder), seed=seed)
        for condition in result.conditions:
            for stage in STAGES:
                measured = stage.of(condition)
                heading = stage.heading.replace("\n", " ")
                for name, rate in (("ASR", measured.attack_success), ("carried out", measured.carried_out), ("utility", measured.utility)):
                    if rate.value is not None:
                        values.setdefault(condition.name, {}).setdefault(f"{name} {heading}", []).append(rate.value)
        print(f"seed {seed} done", flush=True)
    print(f"\nmean [min, max] over seeds {', '.join(map(str, arguments.seeds))}")
    for condition_name, columns in values.items():
        for column, found in columns.items():
            print(f"{condition_name:14s} {column:26s} {sum(found) / len(found):.2f} [{min(found):.2f}, {max(found):.2f}]")
    if arguments.json:
        arguments.json.write_text(json.dumps({"seeds": arguments.seeds, "values": values}, indent=2) + "\n")


if __name__ == "__main__":
    main()
