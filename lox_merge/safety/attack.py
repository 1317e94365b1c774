"""A fine-tuning attack on a model in memory, by `trl.SFTTrainer`: the attacked weights are never written."""

from __future__ import annotations

import copy
import importlib
import math
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lox_merge.errors import LoxMergeError, NumericalError, RequestError
from lox_merge.safety.batches import is_out_of_memory
from lox_merge.safety.chat import Rendering
from lox_merge.safety.conversations import Conversations, tokenised
from lox_merge.safety.seeds import check_seed
from lox_merge.typed_fields import check_fields

# Called with the step and a causal language model in evaluation mode (LoRA layers inside it where LoRA is trained).
Observer = Callable[[int, Any], None]


@dataclass(frozen=True)
class AttackSettings:
    """How every model is fine-tuned. steps: after which optimiser steps it is measured, ascending; 0 is before the attack.

    AdamW (betas 0.9 and adam_beta2), constant learning rate after warmup_steps, gradients clipped to max_grad_norm, float32.
    batch_size: examples a step. max_length: tokens of an example that are kept. lora: train low-rank adapters (rank, lora_alpha)
    of all linear layers instead of all weights.
    """

    steps: tuple[int, ...] = (0, 50, 100)
    learning_rate: float = 2e-5
    batch_size: int = 8
    warmup_steps: int = 0
    adam_beta2: float = 0.999
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 1024
    lora: bool = False
    lora_rank: int = 16
    lora_alpha: int = 32

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.steps or min(self.steps) < 0 or max(self.steps) < 1 or list(self.steps) != sorted(set(self.steps)):
            raise RequestError(f"steps {', '.join(map(str, self.steps))} are not ascending numbers that end above 0, such as 0,50,100.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise RequestError(f"a learning rate of {self.learning_rate} trains nothing; give one above 0, such as 2e-5.")
        if min(self.batch_size, self.max_length - 1, self.lora_rank) < 1 or self.warmup_steps < 0:
            raise RequestError("batch size and LoRA rank must be 1 or more, the length 2 or more, and warm-up steps 0 or more.")
        if not 0 <= self.adam_beta2 < 1:
            raise RequestError(f"adam_beta2 is {self.adam_beta2}: the decay of the second moment is at least 0 and below 1, such as 0.999.")
        for name, value in (("weight_decay", self.weight_decay), ("max_grad_norm", self.max_grad_norm)):
            if not 0 <= value < math.inf:
                raise RequestError(f"{name} is {value}; give a finite number, 0 for none.")

    def to_json(self) -> dict[str, Any]:
        record = asdict(self) | {"steps": list(self.steps)}
        if not self.lora:
            record |= {"lora_rank": None, "lora_alpha": None}
        return record


def check_attack_packages(lora: bool = False) -> None:
    """Raises RequestError where trl (or, for LoRA, peft) is not installed."""
    try:
        importlib.import_module("trl")
    except ImportError as error:
        raise RequestError(f"fine-tuning attacks need the package trl ({error}). Install it: pip install 'lox-merge[attack]'.") from error
    if lora:
        try:
            importlib.import_module("peft")
        except ImportError as error:
            raise RequestError(f"--lora needs the package peft ({error}). Install it: pip install peft.") from error


def fine_tune(
    model: Any,
    tokenizer: Any,
    data: Conversations,
    settings: AttackSettings,
    observe: Observer,
    *,
    seed: int = 0,
    rendering: Rendering | None = None,
    examples: Sequence[dict[str, list[int]]] | None = None,
) -> list[str]:
    """Fine-tunes `model` (float32, on the CPU or the first GPU) in place and observes it at settings.steps.

    The order of the examples follows from seed, data and settings alone, so all models get the same batches. Returns a short hash
    of each batch in the order of training. examples: what `tokenised` gives for `data`, where the caller has it. Nothing is
    saved: no checkpoint, no log; the trainer's folder is private and removed. Raises RequestError for a missing package, another
    dtype or device, NumericalError where the weights do not stay finite, LoxMergeError when memory runs out.
    """
    check_attack_packages(settings.lora)
    seed = check_seed(seed)
    _check_model(model)
    observe = _with_its_end_tokens(model, observe)
    if examples is None:
        examples = tokenised(data, tokenizer, rendering or Rendering(), settings.max_length)
    if 0 in settings.steps:
        model.eval()
        observe(0, model)
    with tempfile.TemporaryDirectory(prefix="lox-merge-attack-") as folder:
        trainer, batches = _trainer(model, copy.deepcopy(tokenizer), examples, settings, observe, seed, folder)
        try:
            trainer.train()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise LoxMergeError(
                "memory ran out while fine-tuning. Use a smaller batch size, a shorter max_length, LoRA adapters, or a larger device."
            ) from error
    return batches


def _with_its_end_tokens(model: Any, observe: Observer) -> Observer:
    """`observe` of a model whose replies end, and are filled up, with the tokens that `model` has now. A trainer puts the tokenizer's in
    their place, and replies after its first step would end elsewhere than those before."""
    generation = copy.deepcopy(getattr(model, "generation_config", None))
    kept = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id") if hasattr(model.config, name)}

    def observed(step: int, model: Any) -> None:
        if generation is not None:
            model.generation_config = copy.deepcopy(generation)
        for name, value in kept.items():
            setattr(model.config, name, value)
        observe(step, model)

    return observed


def _check_model(model: Any) -> None:
    kinds = {(parameter.dtype, parameter.device) for parameter in model.parameters()}
    if {dtype for dtype, _ in kinds} != {torch.float32}:
        raise RequestError("a fine-tuning attack needs float32 weights: steps of a small learning rate vanish in narrower ones. Load with float32.")
    devices = {device for _, device in kinds}
    if len(devices) != 1 or next(iter(devices)) not in (torch.device("cpu"), torch.device("cuda", 0)):
        raise RequestError(
            "the attack runs on the CPU or the first visible GPU; the model is elsewhere. Use --device cpu or cuda (with CUDA_VISIBLE_DEVICES)."
        )


def _trainer(
    model: Any, tokenizer: Any, examples: Sequence[dict[str, list[int]]], settings: AttackSettings, observe: Observer, seed: int, folder: str
) -> tuple[Any, list[str]]:
    from transformers import PrinterCallback, TrainerCallback

    trl, datasets = importlib.import_module("trl"), importlib.import_module("datasets")
    batches: list[str] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step not in settings.steps:
                return
            if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
                raise NumericalError(f"after {state.global_step} steps the attacked weights are not finite. Use a lower learning rate.")
            inner = model.get_base_model() if settings.lora else model
            inner.eval()
            with torch.random.fork_rng(
                [inner.device] if inner.device.type == "cuda" else []
            ):  # what is drawn while measuring must not change the training after it
                observe(state.global_step, inner)
            model.train()

    class Trainer(trl.SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
            batches.append(f"{zlib.crc32(inputs['input_ids'].cpu().numpy().tobytes()):08x}")
            return super().compute_loss(model, inputs, *arguments, **options)

    arguments = trl.SFTConfig(
        output_dir=folder,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
        max_steps=max(settings.steps),
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        optim="adamw_torch",
        adam_beta2=settings.adam_beta2,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        # With the load-balancing loss of mixtures of experts models would give router logits in every later pass, which replies cannot have
        # beside a cache.
        router_aux_loss_coef=0.0,
        max_length=None,  # the examples were cut before
        packing=False,
        dataloader_pin_memory=False,
        use_cpu=model.device.type == "cpu",
        seed=seed,
        data_seed=seed,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # a replica on every GPU would change the batch size with the machine
    adapter = None
    if settings.lora:
        adapter = importlib.import_module("peft").LoraConfig(
            r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        torch.manual_seed(seed)  # the adapter's first values
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(list(examples)),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[Watch()],
    )
    trainer.remove_callback(PrinterCallback)  # progress is the caller's
    return trainer, batches
