"""The files of an output: what each holds, in which order and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from lox_merge.checkpoint import dtypes
from lox_merge.checkpoint.checkpoint import PICKLE, SINGLE, Checkpoint
from lox_merge.checkpoint.quantised.view import QuantisedCheckpoint
from lox_merge.checkpoint.safetensors_format import Header, TensorInfo, build_header
from lox_merge.errors import PlanError
from lox_merge.jobs.select import TensorPlan
from lox_merge.jobs.settings import Settings


@dataclass(frozen=True)
class ShardPlan:
    """One file to write: `header` is byte for byte the mirrored file's where dtypes are kept; tensors in the order of their data.

    weights: (role, file) of what the mirrored tensors are read from.
    """

    file: str
    weights: tuple[tuple[str, str], ...]
    header: Header
    tensors: tuple[TensorPlan, ...]

    def code_in_memory(self, tensor: TensorPlan) -> str:
        """dtype code of an edited tensor before it is written: of a quantised one, the float32 values that its codes stand for."""
        return "F32" if tensor.stored else self.header.tensors[tensor.name].dtype

    def bytes_in_memory(self, tensor: TensorPlan) -> int:
        return 4 * tensor.info.size if tensor.stored else self.header.tensors[tensor.name].bytes

    def sources(self, checkpoints: Mapping[str, Checkpoint]) -> list[tuple[str, str]]:
        """(role, file) of every source file this shard needs, in the order of use."""
        *others, _ = checkpoints.values()
        needed = list(self.weights)
        for tensor in self.tensors:
            if tensor.action == "edit":
                needed += [source for other in others for source in other.weight_sources(other.home[tensor.name_in(other.role)])]
        return list(dict.fromkeys(needed))


def plan_shards(mirrored: Checkpoint, tensors: Mapping[str, TensorPlan], recipe: Settings, *, keep_form: bool = False) -> list[ShardPlan]:
    """The files of an output that mirrors a checkpoint. keep_form: write a quantised checkpoint's codes and scales, not plain weights.

    Raises PlanError where two pickled files have one name in safetensors.
    """
    written: dict[str, str] = {}
    for file in mirrored.headers if mirrored.pickled else ():
        if (before := written.setdefault(_out_file(file), file)) != file:
            raise PlanError(
                [f"{mirrored.role}: {before} and {file} of {mirrored.title} would both be written as {_out_file(file)}. Rename one of them."]
            )
    if keep_form and isinstance(mirrored, QuantisedCheckpoint):
        return [_quantised_shard(file, header, tensors, mirrored) for file, header in mirrored.stored.headers.items()]
    return [_plain_shard(file, header, tensors, mirrored, recipe) for file, header in mirrored.headers.items()]


def _quantised_shard(file: str, header: Header, tensors: Mapping[str, TensorPlan], mirrored: QuantisedCheckpoint) -> ShardPlan:
    ordered = []
    for info in header.by_offset():
        if info.name in mirrored.by_codes:
            ordered.append(replace(tensors[mirrored.by_codes[info.name]], stored=info.name))
        elif info.name in mirrored.beside:
            ordered.append(TensorPlan(info.name, info, "copy", "kept with the quantised weights", stored=info.name))
        else:
            ordered.append(tensors[info.name])
    return ShardPlan(_out_file(file) if mirrored.pickled else file, tuple(mirrored.weight_sources(file)), header, tuple(ordered))


def _out_code(stored: TensorInfo, recipe: Settings) -> str:
    """dtype code that a tensor is written in: every floating tensor follows --dtype, so that the model is of one dtype."""
    if recipe.dtype and stored.dtype in dtypes.EDITABLE:
        return dtypes.OUTPUT_CODES[recipe.dtype]
    return stored.dtype


def _plain_shard(file: str, header: Header, tensors: Mapping[str, TensorPlan], mirrored: Checkpoint, recipe: Settings) -> ShardPlan:
    if any(_out_code(info, recipe) != info.dtype for info in header.tensors.values()):
        entries = [(name, _out_code(info, recipe), info.shape) for name, info in header.tensors.items()]
        header = build_header(entries, header.metadata)
    ordered = tuple(tensors[info.name] for info in header.by_offset())
    return ShardPlan(_out_file(file) if mirrored.pickled else file, tuple(mirrored.weight_sources(file)), header, ordered)


def _out_file(file: str) -> str:
    """safetensors name of a pickled shard, as transformers names it."""
    return SINGLE if file == PICKLE else PurePosixPath(file).name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
