"""What AlignmentWatch adds to a training's time, at its default interval and at every step.

    python benchmarks/watch.py [--hidden 512] [--layers 8] [--steps 60] [--repeat 3] [--lora] [--device cpu]

A random Llama is trained on random tokens, each setting `--repeat` times in turn and in a process of its own, since what one training
leaves of the heap changes the next one's times by a quarter; medians of the seconds a step takes, and of the ratios within a round
(the callback's setup before the first step is reported apart). Nothing is kept.
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
from measure import run_apart
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lox_merge import AlignmentWatch

VOCABULARY = 4096
SETTINGS = ("without", "default", "every step")


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


def run_one(arguments: argparse.Namespace) -> None:
    """In a process of its own: prints JSON."""
    texts = rows(arguments.completions, arguments.completion_length)
    half = arguments.completion_length // 2
    completions = [{"input_ids": text, "labels": [-100] * half + text[half:]} for text in texts]
    options: dict[str, Any] = {} if arguments.setting == "default" else {"interval": 1, "overhead": 1e9}
    watch = None if arguments.setting == "without" else AlignmentWatch(completions=completions, base=arguments.folder / "base", **options)
    record: dict[str, Any] = {"step_seconds": run(arguments, watch, arguments.folder)}
    if watch is not None:
        measured = [entry["seconds"] for entry in watch.history[1:]]
        record |= {"own_account": watch.pace.overhead, "measurements": len(measured), "seconds": statistics.median(measured)}
        record |= {"setup_seconds": watch.setup["seconds"], "kept_bytes": watch.setup["bytes"]}
    print(json.dumps(record))


def make_models(arguments: argparse.Namespace, folder: Path) -> int:
    """Base and aligned in the folder; how many parameters each has."""
    torch.manual_seed(0)
    size = arguments.hidden
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size,
        intermediate_size=3 * size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=size // 64,
        num_key_value_heads=size // 64,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * parameter.std() * torch.randn_like(parameter)
    model.save_pretrained(folder / "aligned")
    return sum(parameter.numel() for parameter in model.parameters())


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
    parser.add_argument("--setting", choices=SETTINGS)
    parser.add_argument("--folder", type=Path, help="of the models, with --setting")
    arguments = parser.parse_args()
    if arguments.setting:
        run_one(arguments)
        return
    with tempfile.TemporaryDirectory() as name:
        parameters = make_models(arguments, Path(name))
        records: dict[str, list[dict[str, Any]]] = {setting: [] for setting in SETTINGS}
        for _ in range(arguments.repeat):
            for setting, some in records.items():
                some.append(run_apart(__file__, "--setting", setting, "--folder", name))
    middle = {setting: {key: statistics.median(record[key] for record in some) for key in some[0]} for setting, some in records.items()}
    for setting in SETTINGS[1:]:
        found = middle[setting]
        pairs = zip(records[setting], records["without"], strict=True)
        found["overhead"] = statistics.median(one["step_seconds"] / other["step_seconds"] for one, other in pairs) - 1
        print(
            f"{setting}: {found['overhead']:+.1%} of a step ({found['own_account']:.1%} by its own account), {found['measurements']} measurements of "
            f"{found['seconds']:.2f} s; a step {middle['without']['step_seconds']:.3f} s; setup {found['setup_seconds']:.1f} s",
            flush=True,
        )
    print(json.dumps({"parameters": parameters, "lora": arguments.lora, "repeat": arguments.repeat} | middle))


if __name__ == "__main__":
    main()
