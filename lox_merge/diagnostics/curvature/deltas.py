"""Differences of weights between fine-tuned models and the one in memory, from files, models or tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lox_merge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lox_merge.checkpoint.placement import place
from lox_merge.checkpoint.quantised.view import quantisation_problems
from lox_merge.errors import PlanError, RequestError
from lox_merge.jobs.quantised import form_of
from lox_merge.jobs.select import counterpart, is_vocabulary
from lox_merge.safety.adapted import open_any
from lox_merge.safety.loading import LoadedModel

# A folder, Hub id or adapter; a model in memory; or differences by parameter name.
Finetuned = str | Path | LoadedModel | torch.nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True)
class Delta:
    """changes: ΔW by parameter name, float32, of those that differ in nothing but values. left_out: reasons by name."""

    label: str
    source: dict[str, Any]
    changes: dict[str, Tensor]
    left_out: dict[str, str]


@dataclass
class Opened:
    """A fine-tuned model whose headers are read, or that is in memory."""

    label: str
    model: Finetuned
    checkpoint: Checkpoint | None = None
    left_out: tuple[str, ...] = ()


def open_finetuned(
    finetuned: Mapping[str, Finetuned] | Sequence[Finetuned],
    aligned: Checkpoint | None,
    cache_dir: Path | None = None,
    *,
    adapter_base: str | Path | None = None,
    base_is_right: bool = False,
) -> list[Opened]:
    """Headers of all of them, compared with aligned's where that is a checkpoint. Raises PlanError with every problem."""
    problems, opened = list[str](), list[Opened]()
    below = aligned if adapter_base is None else open_checkpoint(adapter_base, "adapter base", cache_dir)
    for label, model in _labelled(finetuned).items():
        if not isinstance(model, (str, Path)):
            opened.append(Opened(label, model))
            continue
        try:
            checkpoint = open_any(model, label, cache_dir, adapter_base=below, base_is_right=base_is_right, decode=True)
        except PlanError as error:
            problems += error.problems
            continue
        except RequestError as error:
            problems.append(str(error))
            continue
        problems += quantisation_problems(checkpoint)
        unlike = _unlike(aligned, checkpoint) if aligned is not None else []
        problems += [text for name, text in unlike if not is_vocabulary(name)]
        opened.append(Opened(label, model, checkpoint, tuple(name for name, _ in unlike if is_vocabulary(name))))
    if problems:
        raise PlanError(problems)
    return opened


@torch.no_grad()
def delta_of(opened: Opened, model: Any, names: Sequence[str]) -> Delta:
    """ΔW = fine-tuned − `model`, parameter by parameter. Raises RequestError where a parameter is missing or of another shape."""
    parameters = {name: value for name, value in model.named_parameters() if name in set(names)}
    if opened.checkpoint is not None:
        return _from_files(opened, opened.checkpoint, model, parameters)
    other = opened.model.model if isinstance(opened.model, LoadedModel) else opened.model
    source = opened.model.source if isinstance(opened.model, LoadedModel) else {"name": opened.label}
    if isinstance(other, torch.nn.Module):
        there = dict(other.named_parameters())
        missing = [name for name in parameters if name not in there]
        if missing:
            raise RequestError(f"{opened.label} has no {missing[0]}. Give a model that was fine-tuned from aligned, with adapters merged.")
        return Delta(opened.label, source, {name: _difference(opened.label, name, there[name], value) for name, value in parameters.items()}, {})
    assert isinstance(other, Mapping)
    unknown = [name for name in other if name not in dict(model.named_parameters(remove_duplicate=False))]
    if unknown:
        raise RequestError(f"the weight differences {opened.label} name {unknown[0]}, which is no parameter of {type(model).__name__}.")
    for name, value in other.items():
        if name in parameters and value.shape != parameters[name].shape:
            raise RequestError(f"{name} of {opened.label} is {list(value.shape)}, where the model has {list(parameters[name].shape)}.")
    return Delta(opened.label, source, {name: value for name, value in other.items() if name in parameters}, {})


def _from_files(opened: Opened, checkpoint: Checkpoint, model: Any, parameters: Mapping[str, Tensor]) -> Delta:
    checkpoint.fetch(list(checkpoint.weight_headers))
    state = model.state_dict()
    groups, _ = place(model, checkpoint.names)
    changes: dict[str, Tensor] = {}
    for group in groups:
        if group.plain and group.target in parameters:
            shape = checkpoint.info(group.sources[0][0]).shape
            if tuple(shape) != tuple(state[group.target].shape) and not is_vocabulary(group.target):
                raise RequestError(
                    f"{group.target} of {opened.label} is {list(shape)}, where the model has {list(state[group.target].shape)}. "
                    "Give a model that was fine-tuned from aligned."
                )
        if group.plain and group.target not in parameters:
            continue
        for name, value in group.parameters(checkpoint.tensor, model).items():
            if name in parameters and value.shape == parameters[name].shape:
                changes[name] = _difference(opened.label, name, value, parameters[name])
    lost = [name for name in parameters if name not in changes]
    wrong = [name for name in lost if not is_vocabulary(name)]
    if wrong:
        raise RequestError(f"{opened.label} has no {wrong[0]}. Give a model that was fine-tuned from aligned.")
    source = checkpoint.source.identity() | {"title": checkpoint.title} | form_of(checkpoint)
    return Delta(opened.label, source, changes, dict.fromkeys(lost, "vocabularies differ"))


def _difference(label: str, name: str, value: Tensor, start: Tensor) -> Tensor:
    if value.shape != start.shape:
        raise RequestError(f"{name} of {label} is {list(value.shape)}, where the model has {list(start.shape)}. Give a model of one architecture.")
    wide = torch.promote_types(torch.promote_types(value.dtype, start.dtype), torch.float32)
    found = value.detach().to(device=start.device, dtype=wide) - start.detach().to(wide)
    if not bool(torch.isfinite(found).all()):
        raise RequestError(f"{name} of {label} holds NaN or Inf. One of the models is damaged.")
    return found


def _unlike(aligned: Checkpoint, other: Checkpoint) -> list[tuple[str, str]]:
    """(name, sentence) of tensors that only one has, or that differ in shape."""
    found = []
    for name in aligned.names:
        there = counterpart(name, other)
        if there is None:
            if not is_vocabulary(name):
                found.append((name, f"{other.role} ({other.title}) has no {name}. Give a model that was fine-tuned from {aligned.title}."))
        elif other.info(there).shape != aligned.info(name).shape:
            shapes = f"{list(other.info(there).shape)} in {other.title}, {list(aligned.info(name).shape)} in {aligned.title}"
            found.append((name, f"{name} differs in shape: {shapes}. Give a model that was fine-tuned from aligned."))
    return found


def _labelled(finetuned: Mapping[str, Finetuned] | Sequence[Finetuned]) -> dict[str, Finetuned]:
    """Labels: as given, titles of loaded models, else the last part of the reference; numbered where two would be alike."""
    if isinstance(finetuned, Mapping):
        return dict(finetuned)
    found: dict[str, Finetuned] = {}
    for place_, model in enumerate(finetuned, 1):
        text = Path(model).name if isinstance(model, (str, Path)) else model.title if isinstance(model, LoadedModel) else f"finetuned {place_}"
        found[text if text not in found else f"{text} ({place_})"] = model
    return found
