"""The demo over several seeds with all controls: the tables of docs/toy.md, about a minute a seed.

python examples/toy_many_seeds.py            # seeds 8 to 15, on which no setting was tuned
python examples/toy_many_seeds.py 0 1 2 --json seeds.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from lox_merge.lab.full import MEASURES, full_json, print_full, run_full, spread
from lox_merge.lab.stages import STAGES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, default=list(range(8, 16)))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run_full(Path(folder), seeds=arguments.seeds, progress=lambda text: print(text, flush=True) if text.startswith("seed") else None)
    print_full(results)
    print("\nmean [lowest, highest]")
    models = results[0].benign.models
    print("| | " + " | ".join(models) + " |")
    for name, measure in MEASURES:
        for stage in STAGES:
            cells = []
            for model in models:
                found = spread(results, measure, stage, model)
                cells.append("undefined" if found is None else f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]")
            heading = stage.heading.replace("\n", " ")
            print(f"| {name}, {heading} | " + " | ".join(cells) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(full_json(results), indent=2) + "\n")


if __name__ == "__main__":
    main()
