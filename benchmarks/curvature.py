"""Fisher Gram matrices by hooks against per-example autograd (torch.func: vmap of grad), and the memory that a real shape takes.

    python benchmarks/curvature.py                           both on a small model: time, memory, largest difference
    python benchmarks/curvature.py --shape 468M              hooks alone: 100 completions of 256 tokens, memory beside the model
    python benchmarks/curvature.py --shape 468M --layers 2   the same widths with fewer layers: the same memory of each pass
    python benchmarks/curvature.py --shape 468M --only 'layers\\.12\\.mlp'    a pass of the whole model, for some of its matrices

A processor without instructions for bfloat16 takes a hundred times as long with it: --dtype float32.

Both ways multiply about as much; what the hooks save is memory. Each runs in processes of its own, in turn: the seconds are medians of
--rounds, memory (what it takes beyond the model once that is loaded) is watched in one more, which watching makes slower.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from measure import anonymous_memory, run_apart
from synthetic import SIZES, Shapes
from torch.func import functional_call, grad, vmap

from lox_merge.diagnostics.curvature.gram import fisher_gram

SMALL = Shapes(256, 1024, 4, 1000, 256, 1)


def model_of(shapes: Shapes, layers: int | None, dtype: torch.dtype, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shapes.vocabulary,
        hidden_size=shapes.hidden,
        intermediate_size=shapes.intermediate,
        num_hidden_layers=layers or shapes.layers,
        num_attention_heads=shapes.hidden // 64,
        num_key_value_heads=shapes.key_value // 64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()


def examples_of(count: int, tokens: int, vocabulary: int) -> list[dict[str, list[int]]]:
    rows = torch.randint(0, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": [-100] * (tokens // 4) + row[tokens // 4 :]} for row in rows]


def by_hooks(model: Any, examples: list[dict[str, list[int]]], memory: int, only: str) -> tuple[dict[str, torch.Tensor], int]:
    found = fisher_gram(model, examples, memory=memory, wanted=lambda name: re.search(only, name) is not None)
    return found.grams, found.passes


def by_func(model: Any, examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """All gradients of all examples at once, as vmap gives them; masks are built outside, which vmap asks for."""
    model.set_attn_implementation("eager")
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    tokens = torch.tensor([example["input_ids"] for example in examples], device=model.device)
    labels = torch.tensor([example["labels"] for example in examples], device=model.device)
    length = tokens.shape[1]
    mask = torch.full((1, 1, length, length), float("-inf"), device=model.device, dtype=model.dtype).triu(1)

    def likelihood(weights: dict[str, torch.Tensor], row: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        logits = functional_call(model, weights, (), {"input_ids": row[None], "attention_mask": mask, "use_cache": False}).logits[0, :-1]
        chosen = logits.float().log_softmax(-1).gather(1, label[1:].clamp(min=0)[:, None])[:, 0]
        return (chosen * (label[1:] >= 0)).sum()

    gradients = vmap(grad(likelihood), in_dims=(None, 0, 0))(parameters, tokens, labels)
    return {name: (value.flatten(1) @ value.flatten(1).T).double().cpu() for name, value in gradients.items()}


def run_one(arguments: argparse.Namespace) -> None:
    """In a process of its own: prints JSON."""
    shapes = SIZES[arguments.shape] if arguments.shape else SMALL
    model = model_of(shapes, arguments.layers, getattr(torch, arguments.dtype), arguments.device)
    examples = examples_of(arguments.completions, arguments.tokens, shapes.vocabulary)
    process, peak, done = psutil.Process(), [0], threading.Event()
    start = anonymous_memory(process)
    cuda = arguments.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous_memory(process))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch, daemon=True)
    if arguments.watch:
        watcher.start()
    began, spent = time.perf_counter(), time.process_time()
    passes = 1
    if arguments.way == "hooks":
        grams, passes = by_hooks(model, examples, int(arguments.memory * 1e9), arguments.only)
    else:
        grams = by_func(model, examples)
    # Of the processor, too: other programs on the machine do not count in it.
    seconds, spent = time.perf_counter() - began, time.process_time() - spent
    done.set()
    if arguments.watch:
        watcher.join()
    most = torch.cuda.max_memory_allocated() if cuda else peak[0]
    torch.save(grams, arguments.out)
    print(json.dumps({"seconds": seconds, "processor": spent, "memory": most - start, "passes": passes}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SIZES))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--completions", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--memory", type=float, default=2.0, help="--memory of lox-merge curvature, GB")
    parser.add_argument("--only", default="", help="regular expression of parameters")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--way", choices=["hooks", "func"])
    parser.add_argument("--out")
    parser.add_argument("--watch", action="store_true", help="memory, with --way")
    parser.add_argument("--rounds", type=int, help="of seconds; 0 takes those of the run whose memory is watched")
    arguments = parser.parse_args()
    arguments.completions = arguments.completions or (100 if arguments.shape else 48)
    arguments.tokens = arguments.tokens or (256 if arguments.shape else 64)
    arguments.rounds = (0 if arguments.shape else 5) if arguments.rounds is None else arguments.rounds
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.shape else "float32")
    if arguments.way:
        run_one(arguments)
        return
    ways = ("hooks",) if arguments.shape else ("hooks", "func")
    with tempfile.TemporaryDirectory() as folder:
        records: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for _ in range(arguments.rounds):
            for way in ways:
                records[way].append(run_apart(__file__, "--way", way, "--out", f"{folder}/{way}.pt"))
        found = {}
        for way in ways:
            watched = run_apart(__file__, "--way", way, "--out", f"{folder}/{way}.pt", "--watch")
            found[way] = torch.load(Path(folder) / f"{way}.pt")
            seconds, processor = (median([record[key] for record in records[way] or [watched]]) for key in ("seconds", "processor"))
            spent = f"{seconds:8.2f} s ({processor:.2f} s of the processor)"
            print(f"{way:6s} {spent}  {watched['memory'] / 1e9:6.2f} GB beside the model  {watched['passes']} pass(es)", flush=True)
        if len(found) == 2:
            worst = max(float((one - found["func"][name]).norm() / found["func"][name].norm()) for name, one in found["hooks"].items())
            print(f"largest relative difference of a Gram matrix: {worst:.1e}")


if __name__ == "__main__":
    main()
