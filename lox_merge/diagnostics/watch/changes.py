"""Where a model in training keeps θ_t − θ_0: in its own parameters beside a copy of θ_0, or in LoRA's factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lox_merge.errors import RequestError
from lox_merge.maths.gradients import wide
from lox_merge.maths.weight_changes import Change, DenseChange, LowRankChange

# Ways to begin an adapter that leave the base weights as they were.
_PLAIN_INITS = ("gaussian", "eva")


def check_whole(model: Any) -> None:
    """Raises RequestError for a model of which this process holds parts only."""
    wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    for name, parameter in model.named_parameters():
        kind = "FSDP" if wrapped or type(parameter.data).__name__ == "DTensor" else None
        if kind is None and hasattr(parameter, "ds_id"):
            kind = "DeepSpeed ZeRO-3"
        if kind is not None:
            raise RequestError(
                f"{name} is sharded by {kind}; AlignmentWatch needs whole weights. Train with DDP, ZeRO-2 or on one device, or without it."
            )


class Changes:
    """Every parameter that training can change, by the name under which the model with adapters disabled reads it.

    θ_0: of parameters that are trained themselves, their values now (copied to the CPU, in their dtype); of LoRA, the weights with the
    adapters disabled, of which no copy is needed. Raises RequestError for adapters of other kinds than plain LoRA, and for
    ways to begin one that change the base weights.
    """

    def __init__(self, model: Any, wanted: Callable[[str], bool] = lambda name: True) -> None:
        self._starts: dict[str, Tensor] = {}
        self._now: dict[str, Callable[[], Change]] = {}
        self._weights: dict[str, Callable[[], Tensor]] = {}
        self._model = model
        self._wanted = wanted
        wrapped = _adapter_layers(model)
        inside = tuple(f"{path}." for path, _ in wrapped)
        transposed = _transposed(model)
        for path, layer in wrapped:
            self._adapted(path, layer, transposed)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.startswith(inside):
                self._trained(name, name, parameter, parameter, name in transposed)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._now)

    def now(self, name: str) -> Change:
        """θ_t − θ_0, on the device of the parameter."""
        return self._now[name]()

    def start(self, name: str) -> Tensor:
        """θ_0, as it is stored (of LoRA: the parameter itself)."""
        return self._weights[name]()

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """The model with its adapters disabled, and its own forward pass in place of one that a trainer put around it (autocast)."""
        layers = [layer for _, layer in _adapter_layers(self._model) if not layer.disable_adapters]
        trained = {name: parameter.requires_grad for name, parameter in self._model.named_parameters()}
        around = self._model.__dict__.get("forward") if hasattr(self._model, "_original_forward") else None
        try:
            for layer in layers:
                layer.enable_adapters(False)
            if around is not None:
                del self._model.__dict__["forward"]
            yield
        finally:
            if around is not None:
                self._model.__dict__["forward"] = around
            for layer in layers:
                layer.enable_adapters(True)
            for name, parameter in self._model.named_parameters():
                parameter.requires_grad_(trained[name])

    def _trained(self, name: str, label: str, start: Tensor, parameter: Tensor, transposed: bool) -> None:
        if self._wanted(label):
            kept = start.detach().to("cpu", copy=True)
            self._starts[name] = kept
            self._weights[name] = lambda: kept
            self._now[name] = lambda: DenseChange(wide(parameter.detach()) - wide(kept.to(parameter.device)), transposed)

    def _adapted(self, path: str, layer: Any, transposed: set[str]) -> None:
        if hasattr(layer, "modules_to_save"):
            self._saved_module(path, layer, transposed)
            return
        _check_lora(path, layer)
        base = layer.get_base_layer()
        prefix = f"{path}.base_layer"
        if any(parameter.requires_grad for parameter in base.parameters()):
            raise RequestError(f"{path} trains its own weights beside its adapter (a bias, say), which is not supported. Set bias='none'.")
        name = f"{prefix}.weight"
        if not self._wanted(name):
            return
        self._weights[name] = lambda: base.weight
        linear = hasattr(layer, "lora_A") and not getattr(layer, "lora_embedding_A", None) and isinstance(base, (torch.nn.Linear, _conv1d()))
        self._now[name] = (lambda: _low_rank(layer)) if linear else (lambda: _dense(layer, base.weight, name in transposed))

    def _saved_module(self, path: str, layer: Any, transposed: set[str]) -> None:
        copies = layer.modules_to_save[layer.active_adapters[0]]
        for leaf, parameter in copies.named_parameters():
            name = f"{path}.original_module.{leaf}"
            if parameter.requires_grad:
                self._trained(name, name, layer.original_module.get_parameter(leaf), parameter, name in transposed)


def plain_name(name: str) -> str:
    """A parameter's name in the model without adapters around it."""
    for part in ("base_layer.", "original_module."):
        name = name.replace(f".{part}", ".")
    return name.removeprefix("base_model.model.")


def own_names(model: Any) -> dict[str, str]:
    """Names of the parameters that the model has without adapters around it, by those plain names."""
    layers = {path for path, _ in _adapter_layers(model)}
    found = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        parts = name.split(".")
        if all(part in ("base_layer", "original_module") for place, part in enumerate(parts) if ".".join(parts[:place]) in layers):
            found[plain_name(name)] = name
    return found


def _adapter_layers(model: Any) -> list[tuple[str, Any]]:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper
    except ImportError:
        return []
    return [(path, module) for path, module in model.named_modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def _check_lora(path: str, layer: Any) -> None:
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer):
        raise RequestError(
            f"{path} is a {type(layer).__module__}.{type(layer).__name__}, whose change is not known here. Use LoRA, or train all weights."
        )
    variants = sorted({type(variant).__name__.removesuffix("Variant") for variant in layer.lora_variant.values()})
    if variants:
        raise RequestError(f"{path} is adapted by {', '.join(variants)} (DoRA or the like), which is no sum of weight and factors. Use plain LoRA.")
    if layer.merged:
        raise RequestError(f"the adapter of {path} is merged into its weights. Unmerge it before training.")
    for adapter, bias in layer.lora_bias.items():
        if bias:
            raise RequestError(f"the adapter {adapter} of {path} has a bias of its own (lora_bias). Train it without.")


def check_begin(model: Any) -> None:
    """Raises RequestError for adapters whose beginning moved the base weights (PiSSA, OLoRA, LoftQ …)."""
    for adapter, config in getattr(model, "peft_config", {}).items():
        begin = getattr(config, "init_lora_weights", True)
        if isinstance(begin, str) and begin.lower() not in _PLAIN_INITS:
            raise RequestError(
                f"the adapter {adapter} begins by {begin!r}, which changes the base weights: the aligned model is no longer there. "
                "Use init_lora_weights=True."
            )


def _low_rank(layer: Any) -> LowRankChange:
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    weight = layer.get_base_layer().weight
    if not active:
        rows, columns = layer.out_features, layer.in_features
        return LowRankChange(weight.new_zeros(rows, 1, dtype=torch.float32), weight.new_zeros(1, columns, dtype=torch.float32))
    left = [wide(layer.lora_B[adapter].weight.detach()) * layer.scaling[adapter] for adapter in active]
    right = [wide(layer.lora_A[adapter].weight.detach()) for adapter in active]
    return LowRankChange(torch.cat(left, 1), torch.cat(right))


def _dense(layer: Any, weight: Tensor, transposed: bool) -> DenseChange:
    """Of embeddings, whose factors act on rows that are looked up."""
    known = {*getattr(layer, "lora_A", {}), *getattr(layer, "lora_embedding_A", {})}
    total = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    for adapter in layer.active_adapters:
        if adapter in known:
            total += layer.get_delta_weight(adapter).detach()
    return DenseChange(total, transposed)


def _conv1d() -> type[Any]:
    from transformers.pytorch_utils import Conv1D

    kind: type[Any] = Conv1D
    return kind


def _transposed(model: Any) -> set[str]:
    """Names of weights that are stored as (d_in, d_out)."""
    return {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, _conv1d())}
