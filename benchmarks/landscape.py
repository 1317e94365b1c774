"""What moving a model to a point of a landscape costs beside the replies of 80 prompts (the authors' number).

    python benchmarks/landscape.py FOLDER [--size 468M] [--dtype bfloat16] [--prompts 80] [--repeats 5]

The pair is made in FOLDER on first use. Prompts are 16 random tokens each, and every reply has 60 tokens. Medians over repeats;
the share is of times of this run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

import torch
from rank_change import load, seconds
from synthetic import SIZES, make_pair

from lox_merge.safety.landscape.directions import Axis, Slice, model_slices, random_slices
from lox_merge.safety.landscape.mover import WeightMover
from lox_merge.safety.landscape.sources import Sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="468M", choices=SIZES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    base, aligned = make_pair(arguments.folder / arguments.size, arguments.size)
    axis = Axis(-0.5, 0.5, 20)
    slices: dict[str, Slice] = {
        "random line": random_slices(1, axis, None, 0)[0],
        "random plane": random_slices(1, axis, axis, 0)[0],
        "line between models": model_slices(["base"], axis, None, controls=0, seed=0)[0],
    }
    sources = Sources(aligned, {"base": base})
    model = load(sources.anchor, arguments.size, arguments.dtype, arguments.device)
    movers: list[WeightMover] = []
    figures: dict[str, float | str | bool] = {"size": arguments.size, "dtype": arguments.dtype, "device": arguments.device}
    figures["open"] = seconds(lambda: movers.append(WeightMover(model, sources, sources.randomly_moved((), ()))))
    mover = movers[0]
    for name, where in slices.items():
        figures[f"prepare {name}"] = seconds(lambda where=where: mover.prepare(where))  # type: ignore[misc]
        at = (0.3,) * len(where.directions)
        mover.move(where, at)
        figures[f"move {name}"] = median(seconds(lambda where=where, at=at: mover.move(where, at)) for _ in range(arguments.repeats))  # type: ignore[misc]
    figures["restore"] = median(seconds(mover.restore) for _ in range(arguments.repeats))
    print(json.dumps(figures), flush=True)
    tokens = torch.randint(3, 1000, (arguments.prompts, 16), device=arguments.device)

    def reply() -> None:
        with torch.no_grad():
            model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=60, min_new_tokens=60, do_sample=False, pad_token_id=0)

    figures["replies"] = median(seconds(reply) for _ in range(1 if arguments.device == "cpu" else arguments.repeats))
    for name in slices:
        figures[f"share {name}"] = float(figures[f"move {name}"]) / float(figures["replies"])
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
