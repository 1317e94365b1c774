"""The one training loop of the laboratory: pre-training, alignment and both attacks run it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from lox_merge.lab.language import ANSWER_LENGTH, PAD, PROMPT_LENGTH, TOKEN, Words, encode
from lox_merge.lab.recipe import Training

# What cross_entropy leaves out of the loss by default.
IGNORED = -100


@dataclass(frozen=True)
class Examples:
    """Prompts with answers as token numbers. targets: the same where the loss counts (the answer), IGNORED elsewhere."""

    tokens: Int[Tensor, "examples length"]
    targets: Int[Tensor, "examples length"]


def pack(pairs: Iterable[tuple[Words, Words]]) -> Examples:
    """(prompt, answer) pairs, answers padded to ANSWER_LENGTH."""
    rows = [encode(prompt + answer + (PAD,) * (ANSWER_LENGTH - len(answer))) for prompt, answer in pairs]
    tokens = torch.tensor(rows)
    targets = tokens.masked_fill(tokens == TOKEN[PAD], IGNORED)
    targets[:, :PROMPT_LENGTH] = IGNORED
    return Examples(tokens, targets)


def learning_rate_at(step: int, training: Training) -> float:
    """The learning rate of a step, counted from 0."""
    warmup = training.warmup_steps
    if step < warmup:
        share = (step + 1) / warmup
    elif training.decay == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, training.steps - warmup)))
    else:
        share = 1.0
    return training.learning_rate * share


def train(model: PreTrainedModel, examples: Examples, training: Training, *, seed: int, after_step: Callable[[int], None] | None = None) -> float:
    """Train `model` in place and return the loss of the last batch (nats per token).

    Batches are drawn with replacement by a generator of their own. after_step is called with 1, 2, … and finds the model
    in evaluation mode. Deterministic on one thread.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=training.weight_decay)
    loss = torch.zeros(())
    model.train()
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, training)
        chosen = torch.randint(0, len(examples.tokens), (training.batch_size,), generator=generator)
        # Causal attention and padding at the end only: no attention mask is needed.
        logits = model(input_ids=examples.tokens[chosen], use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), examples.targets[chosen][:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if after_step is not None:
            model.eval()
            after_step(step + 1)
            model.train()
    model.eval()
    return float(loss.detach())
