"""What AlignmentWatch adds to a training's time, at its default interval and at every step.

    python benchmarks/watch.py [--hidden 512] [--layers 8] [--steps 60] [--repeat 3] [--lora] [--device cpu]

A random Llama is trained on random tokens, in one process, each setting `--repeat` times in turn; medians of the seconds a step
takes, and of the ratios within a round (the callback's setup before the first step is reported apart). Nothing is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lox_merge import AlignmentWatch

VOCABULARY = 4096


class Clock(TrainerCallback):
    """Seconds from the end of the setup to the end of the training: of the wall with a GPU, else of the processor, which other work on
    the machine does not lengthen.
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.began = now()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = now() - self.began


def now() -> float:
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def rows(count: int, length: int) -> list[list[int]]:
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(length)).tolist()


def run(arguments: argparse.Namespace, watch: AlignmentWatch | None, folder: Path) -> float:
    model = LlamaForCausalLM.from_pretrained(folder / "aligned")
    if arguments.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokens = rows(256, arguments.length)
    settings = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=1e-4,
        use_cpu=arguments.device == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    clock = Clock()
    callbacks = [clock] if watch is None else [clock, watch]
    Trainer(model=model, args=settings, train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens}), callbacks=callbacks).train()
    return clock.seconds / arguments.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--completions", type=int, default=100)
    parser.add_argument("--completion-length", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    size = arguments.hidden
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size,
        intermediate_size=3 * size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=size // 64,
        num_key_value_heads=size // 64,
        max_position_embeddings=512,
    )
    texts = rows(arguments.completions, arguments.completion_length)
    half = arguments.completion_length // 2
    completions = [{"input_ids": text, "labels": [-100] * half + text[half:]} for text in texts]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = LlamaForCausalLM(config)
        model.save_pretrained(folder / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * parameter.std() * torch.randn_like(parameter)
        model.save_pretrained(folder / "aligned")
        seconds: dict[str, list[float]] = {"without": [], "default": [], "every step": []}
        made: dict[str, AlignmentWatch] = {}
        run(arguments, None, folder)  # warms up
        for _ in range(arguments.repeat):
            for setting, times in seconds.items():
                options: dict[str, Any] = {} if setting == "default" else {"interval": 1, "overhead": 1e9}
                watch = None if setting == "without" else AlignmentWatch(completions=completions, base=folder / "base", **options)
                times.append(run(arguments, watch, folder))
                if watch is not None:
                    made[setting] = watch
    plain = statistics.median(seconds["without"])
    result: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters()), "lora": arguments.lora, "step_seconds": plain}
    for setting, watch in made.items():
        ratio = statistics.median(one / other for one, other in zip(seconds[setting], seconds["without"], strict=True))
        measured = [entry["seconds"] for entry in watch.history[1:]]
        own = {"overhead": ratio - 1, "own_account": watch.pace.overhead, "measurements": len(measured), "seconds": statistics.median(measured)}
        result[setting] = own | {"setup_seconds": watch.setup["seconds"], "kept_bytes": watch.setup["bytes"]}
        print(
            f"{setting}: {ratio - 1:+.1%} of a step ({watch.pace.overhead:.1%} by its own account), {len(measured)} measurements of "
            f"{statistics.median(measured):.2f} s; a step {plain:.3f} s; setup {watch.setup['seconds']:.1f} s",
            flush=True,
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
