"""Gradients of each completion by autograd alone, on tiny float64 models: what the hooks are compared with."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import CONFIGS
from torch import Tensor
from transformers import AutoModelForCausalLM

Example = dict[str, list[int]]


def tiny(architecture: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A random model of two layers; experts run eagerly, since grouped products know no float64."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture]({"hidden": 32, "layers": 2, "vocabulary": 96}, settings)).to(dtype).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def completions(lengths: tuple[int, ...] = (7, 12, 5, 9, 12), seed: int = 1) -> list[Example]:
    """Prompts of half the length; one completion ends before its text does, one prompt holds the padding token."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for place, length in enumerate(lengths):
        tokens = torch.randint(6, 96, (length,), generator=generator).tolist()
        labels = [-100] * (length // 2) + tokens[length // 2 :]
        if place == 3:
            labels[-2:] = [-100, -100]
        if place == 1:
            tokens[2] = 0
        examples.append({"input_ids": tokens, "labels": labels})
    return examples


def log_likelihood(model: Any, example: Example, reduction: str = "sum") -> Tensor:
    """log p(response | prompt), one text and no padding."""
    tokens = torch.tensor([example["input_ids"]])
    scores = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0].log_softmax(-1)
    places = [place for place, label in enumerate(example["labels"]) if label != -100]
    values = torch.stack([scores[place - 1, example["input_ids"][place]] for place in places])
    return values.sum() if reduction == "sum" else values.mean()


def explicit_gradients(model: Any, examples: list[Example], reduction: str = "sum") -> list[dict[str, Tensor]]:
    """g_i by parameter name; zero for parameters without a part in the likelihood."""
    found = []
    parameters = dict(model.named_parameters())
    for example in examples:
        values = torch.autograd.grad(log_likelihood(model, example, reduction), list(parameters.values()), allow_unused=True)
        found.append({name: torch.zeros_like(parameters[name]) if value is None else value for name, value in zip(parameters, values, strict=True)})
    return found


def flat(gradients: list[dict[str, Tensor]], names: tuple[str, ...]) -> Tensor:
    """(n, parameters) of these parameters, joined."""
    return torch.stack([torch.cat([one[name].flatten() for name in names]) for one in gradients])
