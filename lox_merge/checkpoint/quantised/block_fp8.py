"""fp8 as DeepSeek stores it (quant_method "fp8"): F8_E4M3 weights, and `<weight>_scale_inv` with one scale for a block, or for all.

The scales multiply: w = weight · scale_inv. https://huggingface.co/deepseek-ai/DeepSeek-V3 (README_WEIGHTS.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.checkpoint.quantised.stored import SCALE_DTYPES, Found, StoredTensor

_SUFFIX = "_scale_inv"
# Of static activation scales, beside the weight that they are for.
_ACTIVATION = (".activation_scale", ".input_scale")


def describe(settings: Mapping[str, Any]) -> str:
    block = settings.get("weight_block_size")
    return f"fp8, {_times(block)} blocks" if block else "fp8, one scale a tensor"


def unsupported(settings: Mapping[str, Any]) -> str | None:
    """Why these settings are not read; None where they are."""
    block = settings.get("weight_block_size")
    if block is not None and not (isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)):
        return f"weight_block_size {block!r} is not two numbers"
    return None


def find(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Found:
    """Every weight of an fp8 checkpoint, from its headers. Modules that were left in bf16 are what their dtype says."""
    found = Found()
    where = f"{checkpoint.role} ({checkpoint.title})"
    block = settings.get("weight_block_size")
    for name in checkpoint.names:
        info = checkpoint.info(name)
        if name.endswith(_ACTIVATION):
            found.beside.add(name)
        elif name.endswith(_SUFFIX):
            weight = name.removesuffix(_SUFFIX)
            if weight not in checkpoint or checkpoint.info(weight).dtype not in ("F8_E4M3", "F8_E5M2"):
                there = f"{weight} is {checkpoint.info(weight).describe()}" if weight in checkpoint else f"there is no {weight}"
                found.problems.append(f"{where}: {name} holds scales, but {there}. Download or save the checkpoint again.")
            found.beside.add(name)
        elif info.dtype in ("F8_E4M3", "F8_E5M2"):
            if len(info.shape) not in (2, 3):
                found.problems.append(f"{where}: tensor {name} is {info.describe()}; fp8 weights have two dimensions, or three for stacked experts.")
                continue
            # No larger than the matrix: numbers of a config know no bound.
            size = tuple(max(1, min(side, part)) for side, part in zip(info.shape[-2:], block or info.shape[-2:], strict=True))
            tensor = StoredTensor(name, info.shape, name, name + _SUFFIX, "float8", (size[0], size[1]), info.dtype)
            scale = checkpoint.info(tensor.scale) if tensor.scale in checkpoint else None
            found.check_table(tensor.scale, "scale", scale, tensor, SCALE_DTYPES, where)
            found.tensors[name] = tensor
    return found


def _times(block: Any) -> str:
    return "×".join(map(str, block)) if isinstance(block, list) else str(block)
