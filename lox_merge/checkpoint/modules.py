"""Which module and parameter of the transformers model each stored tensor becomes, without building its weights.

PEFT names modules of the loaded model, checkpoints name tensors: transformers 5 renames some of them and stacks experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.checkpoint.config_checks import check_depth
from lox_merge.checkpoint.placement import Group, place
from lox_merge.errors import SourceError

Kind = Literal["linear", "conv1d", "embedding", "convolution", "parameter", "other"]
# Sides of the probes that show how tensors are put together: different, so that a transposition would show.
_ROWS, _COLUMNS = 2, 3


@dataclass(frozen=True)
class Place:
    """Where a stored tensor is in the model.

    module, leaf: the parameter is `module.leaf`. kind: what the module is to PEFT; 'parameter' for one that belongs to no
    layer type (stacked experts, routers). transposed: whether its matrices are (d_in, d_out). expert: the tensor's place in a
    stack. part: (position, count) along the rows of the expert's matrix where several tensors are joined there.
    """

    module: str
    leaf: str
    kind: Kind
    transposed: bool = False
    expert: int | None = None
    part: tuple[int, int] | None = None

    @property
    def parameter(self) -> str:
        return f"{self.module}.{self.leaf}" if self.module else self.leaf


@dataclass(frozen=True)
class ModelMap:
    """places: by name of the stored tensor; those that the model takes in another way than known here are absent.

    order: parameters of each module in the order in which the module registers them. tied: parameters that are the same tensor
    as another one, by name.
    """

    places: dict[str, Place]
    order: dict[str, list[str]]
    tied: dict[str, str]

    @cached_property
    def stored(self) -> dict[str, dict[str, Place]]:
        """Stored tensors and their places by the parameter that they become."""
        found: dict[str, dict[str, Place]] = {}
        for name, where in self.places.items():
            found.setdefault(where.parameter, {})[name] = where
        return found


def map_model(checkpoint: Checkpoint) -> ModelMap | None:
    """Reads config.json only; no weights. None for a model that transformers does not build by itself (code of its own).

    Raises SourceError for a configuration that transformers does not understand.
    """
    file = f"{checkpoint.role}: {checkpoint.title}/config.json"
    check_depth(checkpoint.config, len(checkpoint.names), file)
    try:
        model = empty_model(checkpoint.config)
    except Exception as error:  # a model's own code raises whatever it runs into
        raise SourceError(f"{file} describes no model that transformers can build: {type(error).__name__}: {error}. Restore it.") from error
    if model is None:
        return None
    groups, _ = place(model, checkpoint.names)
    modules = dict(model.named_modules())
    layouts: dict[tuple[Any, ...], list[tuple[int, tuple[int, int] | None]] | None] = {}
    places: dict[str, Place] = {}
    for group in groups:
        module, _, leaf = group.target.rpartition(".")
        where = Place(module, leaf, *_kind(modules[module], leaf))
        if group.plain:
            places[group.sources[0][0]] = where
            continue
        key = (id(group.converter), len(group.sources))
        if key not in layouts:
            layouts[key] = _layout(group, model)
        for (name, _pattern), found in zip(group.sources, layouts[key] or (), strict=False):
            places[name] = replace(where, expert=found[0], part=found[1])
    order = {name: [leaf for leaf, _ in module.named_parameters(recurse=False)] for name, module in modules.items()}
    return ModelMap(places, order, _tied(model))


def empty_model(config: dict[str, Any]) -> Any:
    """The model on the meta device: shapes and types, no memory."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names = config.get("architectures") or []
    kind = getattr(transformers, names[0], None) if len(names) == 1 else None
    # A name in a file must not call whatever else transformers has.
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)) or config.get("model_type") not in CONFIG_MAPPING:
        return None
    plain = {key: _with_floats(value) for key, value in config.items() if key != "quantization_config"}
    settings = CONFIG_MAPPING[config["model_type"]].from_dict(plain)
    with torch.device("meta"):
        return kind(settings)


def _with_floats(value: Any) -> Any:
    """Numbers that JSON has not, as transformers writes them: {"__float__": "Infinity"} (the time steps of Mamba 2)."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _with_floats(inner) for key, inner in value.items()}
    return [_with_floats(inner) for inner in value] if isinstance(value, list) else value


def _kind(module: Any, leaf: str) -> tuple[Kind, bool]:
    from transformers.pytorch_utils import Conv1D

    if leaf == "weight":
        for kind, types in (("linear", torch.nn.Linear), ("embedding", torch.nn.Embedding), ("convolution", (torch.nn.Conv2d, torch.nn.Conv3d))):
            # Kernels of groups of channels have no factors in PEFT.
            if isinstance(module, types) and getattr(module, "groups", 1) == 1:
                return kind, False  # type: ignore[return-value]
        if isinstance(module, Conv1D):
            return "conv1d", True
    value = getattr(module, leaf)
    if value.ndim >= 2:
        return "parameter", value.ndim == 3 and bool(getattr(module, "is_transposed", False))
    return "other", False


def _tied(model: Any) -> dict[str, str]:
    """Parameters that are left out of `named_parameters` because they are another one's tensor."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return tied


def _layout(group: Group, model: Any) -> list[tuple[int, tuple[int, int] | None]] | None:
    """(expert, part) of each source, found by sending small numbered matrices through the conversion; None if it is another one."""
    probes = {name: _probe(position) for position, (name, _) in enumerate(group.sources)}
    try:
        made = group.parameters(probes.__getitem__, model)
    except Exception:  # a conversion may need real shapes; then its layout is not known
        return None
    stack = made.get(group.target)
    if len(made) != 1 or stack is None or stack.ndim != 3 or stack.shape[2] != _COLUMNS or stack.shape[1] % _ROWS:
        return None
    count = stack.shape[1] // _ROWS
    found: dict[int, tuple[int, tuple[int, int] | None]] = {}
    for expert in range(stack.shape[0]):
        for part in range(count):
            block = stack[expert, part * _ROWS : (part + 1) * _ROWS]
            position = int(block[0, 0]) // (_ROWS * _COLUMNS)
            if not 0 <= position < len(group.sources) or not torch.equal(block, _probe(position)):
                return None
            found[position] = (expert, (part, count) if count > 1 else None)
    return [found[position] for position in range(len(group.sources))] if len(found) == len(group.sources) else None


def _probe(position: int) -> Tensor:
    size = _ROWS * _COLUMNS
    return torch.arange(position * size, (position + 1) * size, dtype=torch.float64).view(_ROWS, _COLUMNS)
