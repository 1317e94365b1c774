"""Tensor names in a PEFT adapter file, and which change of which stored tensor of the base model each of them is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lox_merge.checkpoint.adapter_config import AdapterConfig
from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.checkpoint.modules import ModelMap, Place
from lox_merge.checkpoint.safetensors_format import Header, TensorInfo

PREFIX = "base_model.model."
INNER = ".base_layer"
_ENDS = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "A", ".lora_embedding_B": "B"}
_UNKNOWN = Place("", "weight", "other")


@dataclass(frozen=True)
class LowRank:
    """scale · B·A on one stored tensor. first, second: names of A and B in the adapter file.

    transposed: the stored matrix is (B·A)ᵀ (Conv1D, embeddings). experts: matrices stacked in the adapter's A and B (0: none);
    expert, part: which of them, and which piece of its rows, the stored tensor is; expert None for a stored stack.
    """

    first: str
    second: str
    scale: float
    rank: int
    transposed: bool = False
    experts: int = 0
    expert: int | None = None
    part: tuple[int, int] | None = None


@dataclass
class Change:
    """What an adapter does to one stored tensor: replaces it by one of its own (None: it does not), then adds to it.

    twins: pairs of adapter tensors that have to be equal (the second one transposed or not), because the tensor is tied.
    """

    replaced_by: str | None = None
    added: LowRank | None = None
    twins: list[tuple[str, str, bool]] = field(default_factory=list)


class Resolver:
    """Matches the tensors of one adapter file with the stored tensors of `base`; problems hold a line for each that fits nothing."""

    def __init__(self, header: Header, config: AdapterConfig, base: Checkpoint, model: ModelMap | None, where: str) -> None:
        self._config, self._base, self._model, self._where = config, base, model, where
        self.changes: dict[str, Change] = {}
        self.problems: list[str] = []
        pairs: dict[str, dict[str, TensorInfo]] = {}
        for name, info in header.tensors.items():
            path = name.removeprefix(PREFIX)
            end = next((end for end in _ENDS if name.endswith(end)), None)
            if not name.startswith(PREFIX):
                self._problem(f"tensor {name} does not begin with {PREFIX}: PEFT writes no such names. Save the adapter again.")
            elif end is not None:
                pairs.setdefault(path.removesuffix(end), {})[_ENDS[end]] = info
            elif ".lora_" in path:
                self._problem(f"tensor {name} is no part of a plain LoRA. Merge the adapter with peft (merge_and_unload) and give that model.")
            else:
                self._replace(path, info)
        for module, pair in pairs.items():
            if pair.keys() == {"A", "B"}:
                self._add(module, pair["A"], pair["B"])
            else:
                name = next(iter(pair.values())).name
                self._problem(f"tensor {name} has no counterpart (lora_A goes with lora_B). Save the adapter again.")
        self._check_tied()

    def _problem(self, text: str) -> None:
        self.problems.append(f"{self._where}: {text}")

    def _at(self, name: str) -> Change:
        return self.changes.setdefault(name, Change())

    def _unknown(self, info: TensorInfo) -> None:
        self._problem(
            f"{info.name} belongs to no tensor of {self._base.title}. The adapter was trained on another model, or with another version of its code."
        )

    def _stored(self, module: str, leaf: str) -> dict[str, Place]:
        """The stored tensors that a parameter is made of: by the model's own rules, else by name."""
        parameter = f"{module}.{leaf}"
        if self._model is not None:
            found = self._model.stored.get(parameter) or self._model.stored.get(self._model.tied.get(parameter, ""))
            if found:
                return found
        if parameter not in self._base:
            return {}
        # Adapters of older versions of transformers name modules as the checkpoint does: one expert, one matrix.
        place = self._model.places.get(parameter, _UNKNOWN) if self._model else _UNKNOWN
        return {parameter: Place("", leaf, "linear") if place.expert is not None else place}

    def _replace(self, path: str, info: TensorInfo) -> None:
        """A tensor stored whole: modules_to_save, or the weights of an embedding beside its factors."""
        module, _, leaf = path.rpartition(".")
        found = self._stored(module.removesuffix(INNER), leaf)
        if len(found) != 1:
            self._unknown(info)
            return
        name = next(iter(found))
        there = self._base.info(name)
        if there.shape != info.shape:
            rows_differ = len(info.shape) == 2 and info.shape[1:] == there.shape[1:]
            self._problem(
                f"{info.name} is {info.describe()} and replaces {name}, which is {there.describe()} in {self._base.title}. "
                f"{'It resizes the vocabulary: merge the adapter' if rows_differ else 'Merge it'} with peft (merge_and_unload) and give that model."
            )
        elif self._at(name).replaced_by is None:
            self._at(name).replaced_by = info.name
        else:
            self._at(name).twins.append((str(self._at(name).replaced_by), info.name, False))

    def _add(self, module: str, first: TensorInfo, second: TensorInfo) -> None:
        owner, leaf = self._parameter(module)
        found = self._stored(owner, leaf)
        if not found:
            self._unknown(first)
            return
        name, place = next(iter(found.items()))
        shape = self._base.info(name).shape
        experts = 1 + max(each.expert or 0 for each in found.values()) if place.expert is not None else 0
        if place.kind == "parameter" and len(shape) == 3:
            experts = shape[0]
        key = f"{owner}.{leaf}" if self._targeted(f"{owner}.{leaf}") else owner
        rank = self._config.rank_of(key)
        if first.shape[0] != rank * max(1, experts) or second.shape[1:2] != first.shape[:1]:
            each = f" for each of {experts} experts" if experts else ""
            self._problem(
                f"{first.name} is {list(first.shape)} and {second.name} {list(second.shape)}, but adapter_config.json gives {key} rank {rank}{each}. "
                "Save the adapter again."
            )
            return
        for name, place in found.items():
            transposed = place.transposed or "lora_embedding" in first.name
            change = LowRank(first.name, second.name, self._config.scale_of(key), rank, transposed, experts, place.expert, place.part)
            self._change(name, place, change, first, second)

    def _change(self, name: str, place: Place, change: LowRank, first: TensorInfo, second: TensorInfo) -> None:
        info = self._base.info(name)
        stored = info.shape[1:] if change.experts and len(info.shape) == 3 else (info.shape[0], math.prod(info.shape[1:]))
        rows, columns = second.shape[0] // (change.part[1] if change.part else 1), math.prod(first.shape[1:])
        wanted = (columns, rows) if change.transposed else (rows, columns)
        there = self._at(name).added
        if wanted != stored:
            self._problem(
                f"{first.name} {list(first.shape)} and {second.name} {list(second.shape)} make a change of {list(wanted)}, but {name} is "
                f"{info.describe()} in {self._base.title}. The adapter belongs to another base model."
            )
        elif there is None:
            self._at(name).added = change
        elif self._ties(name) and there.scale == change.scale and there.rank == change.rank and there.transposed != change.transposed:
            self._at(name).twins += [(there.first, change.second, True), (there.second, change.first, True)]
        else:
            self._problem(f"{first.name} and {there.first} both change {name}. Merge the adapter with peft (merge_and_unload) and give that model.")

    def _parameter(self, module: str) -> tuple[str, str]:
        """Module and parameter that a pair changes. PEFT wraps the targeted parameters of a module in each other, the first innermost."""
        depth = 0
        owner = module
        while owner.endswith(INNER):
            owner, depth = owner.removesuffix(INNER), depth + 1
        leaves = self._model.order.get(owner, []) if self._model else []
        wrapped = [leaf for leaf in leaves if self._targeted(f"{owner}.{leaf}")]
        return (owner, wrapped[-1 - depth]) if depth < len(wrapped) else (module, "weight")

    def _targeted(self, parameter: str) -> bool:
        return any(parameter == target or parameter.endswith(f".{target}") for target in self._config.target_parameters)

    def _ties(self, name: str) -> bool:
        place = self._model.places.get(name) if self._model else None
        return place is not None and self._model is not None and place.parameter in self._model.tied.values()

    def _check_tied(self) -> None:
        for name, change in self.changes.items():
            if self._ties(name) and not change.twins:
                source = change.replaced_by or (change.added.first if change.added else "")
                self._problem(
                    f"{source} changes {name}, which {self._base.title} uses as token embedding and as output head. PEFT changes one of them while "
                    "the adapter is loaded and both when it is merged; which is meant cannot be told. Merge it as you mean it and give that model."
                )
