"""Gradient g of a fine-tuning loss and its own change along itself, ∇g·g, batch by batch, by differentiating twice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lox_merge.diagnostics.curvature.walk import Example, log_likelihood
from lox_merge.errors import LoxMergeError, NumericalError, RequestError
from lox_merge.safety.batches import is_out_of_memory, right_padded
from lox_merge.safety.conversations import IGNORED
from lox_merge.safety.progress import CountProgress

Vector = dict[str, Tensor]


@dataclass(frozen=True)
class SecondOrder:
    """Of one group of parameters: gradients g_b and products H_b g of each batch, float32 or wider, and H r of a random r, ||r|| = ||g||.

    g is the mean of g_b over all batches and all parameters, also in H_b g.
    """

    names: tuple[str, ...]
    gradients: list[Vector]
    products: list[Vector]
    control: Vector


def batch_loss(model: Any, rows: Sequence[Example]) -> Tensor:
    """Mean cross-entropy over the labelled tokens of a batch, as trainers of transformers have it: a scalar, nats."""
    tokens, mask = right_padded([row["input_ids"] for row in rows], 0, model.device)
    count = sum(label != IGNORED for row in rows for label in row["labels"][1:])
    return -log_likelihood(model, tokens, mask, rows, "sum") / count


def second_order(
    model: Any, batches: Sequence[Sequence[Example]], names: Sequence[str], *, memory: int, seed: int, progress: CountProgress
) -> Iterator[SecondOrder]:
    """Group by group of `names`, so that the vectors of all batches fit into `memory` bytes; one group where they do.

    The model must be in `twice_differentiable`. Progress: 2 for each batch and group. Raises NumericalError, LoxMergeError.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in set(names)}
    mean = {name: torch.zeros_like(value, dtype=_wide(value)) for name, value in parameters.items()}
    groups = _groups(parameters, memory // (2 * len(batches) + 1))
    kept: list[Vector] = []
    for rows in batches:
        gradient = _gradient(model, rows, parameters)
        for name, value in gradient.items():
            mean[name] += value.to(mean[name].dtype) / len(batches)
        if len(groups) == 1:
            kept.append(gradient)
        progress.advance(1)
    random = _random_like(mean, seed)
    for group in groups:
        own = {name: parameters[name] for name in group}
        gradients = kept or [_gradient(model, rows, own) for rows in batches]
        products, control = list[Vector](), {name: torch.zeros_like(mean[name]) for name in group}
        for rows in batches:
            along, across = _products(model, rows, parameters, (mean, random), group)
            products.append(along)
            for name in group:
                control[name] += across[name] / len(batches)
            progress.advance(1)
        yield SecondOrder(tuple(group), gradients, products, control)


@contextmanager
def twice_differentiable(model: Any, names: Sequence[str]) -> Iterator[list[str]]:
    """Evaluation mode, gradients of these parameters, and attention and experts in plain torch; all as before on leaving.

    Gives what was chosen in place of what, for the result: fused kernels have no second derivative.
    """
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {module: module.training for module in model.modules()}
    chosen: list[str] = []
    before: list[tuple[Any, Any]] = []
    model.eval()
    try:
        for kind in ("attn", "experts"):
            there, change = getattr(model.config, f"_{kind}_implementation", None), getattr(model, f"set_{kind}_implementation", None)
            if there not in (None, "eager") and change is not None:
                before.append((change, there))
                try:
                    change("eager")
                except ValueError as error:
                    raise RequestError(
                        f"{type(model).__name__} has no plain attention to differentiate twice ({error}). Leave out the data sets."
                    ) from error
                chosen.append(f"{'attention' if kind == 'attn' else 'experts'}: eager in place of {there}, whose kernel has no second derivative")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in set(names))
        with torch.enable_grad():
            yield chosen
    finally:
        for change, there in before:
            change(there)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
        for module, mode in modes.items():
            module.training = mode


def _gradient(model: Any, rows: Sequence[Example], parameters: Vector) -> Vector:
    with _memory_errors():
        values = torch.autograd.grad(_finite(batch_loss(model, rows)), list(parameters.values()), allow_unused=True)
    return {name: _filled(value, parameters[name]) for name, value in zip(parameters, values, strict=True)}


def _products(model: Any, rows: Sequence[Example], parameters: Vector, directions: Sequence[Vector], group: Sequence[str]) -> list[Vector]:
    """H_b v over the parameters of `group`, for every direction v."""
    with _memory_errors():
        first = torch.autograd.grad(_finite(batch_loss(model, rows)), list(parameters.values()), create_graph=True, allow_unused=True)
        found = []
        for place, direction in enumerate(directions):
            terms = [(value * direction[name].to(value.dtype)).sum() for name, value in zip(parameters, first, strict=True) if value is not None]
            own = [parameters[name] for name in group]
            values = torch.autograd.grad(torch.stack(terms).sum(), own, retain_graph=place + 1 < len(directions), allow_unused=True)
            found.append({name: _filled(value, parameters[name]) for name, value in zip(group, values, strict=True)})
    return found


def _groups(parameters: Vector, room: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    free = room
    for name, value in parameters.items():
        needed = value.numel() * _wide(value).itemsize
        if needed > free and groups[-1]:
            groups.append([])
            free = room
        groups[-1].append(name)
        free -= needed
    return groups


def _random_like(mean: Vector, seed: int) -> Vector:
    """A Gaussian direction of the same norm, drawn on the CPU so that every device gets the same."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(value.shape, generator=generator).to(device=value.device, dtype=value.dtype) for name, value in mean.items()}
    scale = norm(mean) / norm(drawn)
    return {name: value * scale for name, value in drawn.items()}


def norm(vector: Vector) -> float:
    """Euclidean norm over all parameters, summed in float64."""
    return math.sqrt(sum(float(value.double().square().sum()) for value in vector.values()))


def inner(one: Vector, other: Vector) -> float:
    return sum(float((value.double() * other[name].double()).sum()) for name, value in one.items())


def _filled(value: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=_wide(parameter)) if value is None else value.detach().to(_wide(parameter))


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def _finite(loss: Tensor) -> Tensor:
    if not bool(torch.isfinite(loss)):
        raise NumericalError("the loss on a batch of a data set is not finite. Load the model in float32, or check its weights.")
    return loss


@contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "does not have a derivative" in str(error) or ("not implemented" in str(error) and "derivative" in str(error)):
            raise RequestError(f"a kernel of this model cannot be differentiated twice ({error}). Leave out the data sets.") from error
        if not is_out_of_memory(error):
            raise
        raise LoxMergeError("memory ran out while differentiating twice. Use smaller batches, a shorter --max-length, or fewer layers.") from error
