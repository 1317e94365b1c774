"""What changing the rank in memory costs beside the replies of 100 prompts.

    python benchmarks/rank_change.py FOLDER [--size 468M] [--dtype bfloat16] [--prompts 100] [--edit removal]

The pair is made in FOLDER on first use. Prompts are 16 random tokens each, and every reply has 60 tokens. --edit: theta as in search, or
what the brittleness probe takes away.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from synthetic import SIZES, make_pair
from transformers import LlamaConfig, LlamaForCausalLM

from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.recipe import Recipe
from lox_merge.safety.rank_edits import REMOVAL, THETA, random_removal
from lox_merge.safety.rank_model import RankSwapper

EDITS = {
    "theta": THETA,
    "removal": REMOVAL,
    "random": random_removal("random", 0, 0),
    "random-subspace": random_removal("random-subspace", 0, 0),
}


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def load(aligned: Checkpoint, size: str, dtype: str, device: str) -> LlamaForCausalLM:
    shapes = SIZES[size]
    config = LlamaConfig(
        vocab_size=shapes.vocabulary,
        hidden_size=shapes.hidden,
        intermediate_size=shapes.intermediate,
        num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.hidden // 64,
        num_key_value_heads=shapes.key_value // 64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.load_state_dict({name: aligned.tensor(name) for name in aligned.names})
    return model.to(device).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="468M", choices=SIZES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--edit", default="theta", choices=EDITS)
    arguments = parser.parse_args()
    base, aligned = make_pair(arguments.folder / arguments.size, arguments.size)
    recipe = Recipe(rank=8)
    result = decompose(base, aligned, arguments.folder / f"{arguments.size}.safetensors", recipe=recipe, device=arguments.device)
    plan = plan_hardening(base, aligned, arguments.folder / "unused", recipe=recipe)
    model = load(plan.aligned, arguments.size, arguments.dtype, arguments.device)
    figures: dict[str, float | str] = {"size": arguments.size, "dtype": arguments.dtype, "device": arguments.device, "decompose": result.seconds}
    swappers: list[RankSwapper] = []
    figures["prepare"] = seconds(lambda: swappers.append(RankSwapper(model, plan, result.factors, edit=EDITS[arguments.edit])))
    swapper = swappers[0]
    swapper.set_rank(1)
    for rank in (0, 1, 3, 8):
        figures[f"set_rank {rank}"] = seconds(lambda rank=rank: swapper.set_rank(rank))  # type: ignore[misc]
    figures["use"] = seconds(lambda: swapper.use(EDITS[arguments.edit]))
    swapper.set_rank(8)
    figures["realised_gain"] = seconds(swapper.realised_gain)
    figures["restore"] = seconds(swapper.restore)
    print(json.dumps(figures), flush=True)
    tokens = torch.randint(3, 1000, (arguments.prompts, 16), device=arguments.device)

    def reply() -> None:
        with torch.no_grad():
            model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=60, min_new_tokens=60, do_sample=False, pad_token_id=0)

    figures["replies"] = seconds(reply)
    figures["share"] = float(figures["set_rank 8"]) / float(figures["replies"])
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
