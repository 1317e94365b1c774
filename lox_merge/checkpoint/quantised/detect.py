"""What quantised form a checkpoint has, and whether it is read: the registry of formats, and words for those that are refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lox_merge.checkpoint import dtypes
from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.checkpoint.quantised import block_fp8, compressed
from lox_merge.checkpoint.quantised.stored import Found
from lox_merge.checkpoint.safetensors_format import TensorInfo

# Names under which quantisation libraries keep packed integers, zero points and what belongs to them.
_PACKED_NAME = re.compile(r"\.(qweight|qzeros|g_idx|weight_packed|weight_zero_point|weight_shape|SCB|absmax|W_q)$|quant_state|quant_map")
# Scales, by what they scale. Models have parameters of their own that are called so (DeepSeek V4, norms of some): a scale is one of a
# quantised form where the tensor is there that it belongs to.
_SCALE_NAME = re.compile(r"(?P<of>.+?)(_scale(_inv|_2)?|[._]scales?)$")
# How almost all names end that cannot match it; models of 100,000 tensors exist, and this is twenty times as fast.
_PLAIN_ENDS = (".weight", ".bias")
# What is scaled by X_scale, X_scales, X.scales or X._scale: X itself, or what stands beside its scales.
_SCALED_ENDS = ("", "_blocks", "_packed", ".qweight", "._data")


@dataclass(frozen=True)
class Format:
    """A quantised form that is read. unsupported: why a config of this method is not; None where it is."""

    describe: Callable[[Mapping[str, Any]], str]
    unsupported: Callable[[Mapping[str, Any]], str | None]
    find: Callable[[Checkpoint, Mapping[str, Any]], Found]


# By quant_method.
FORMATS = {
    "fp8": Format(block_fp8.describe, block_fp8.unsupported, block_fp8.find),
    "compressed-tensors": Format(compressed.describe, compressed.unsupported, compressed.find),
}


def settings_of(checkpoint: Checkpoint) -> Any:
    """quantization_config, of the model or of its language model; None where there is none."""
    text = checkpoint.config.get("text_config")
    parts = (checkpoint.config, text if isinstance(text, dict) else {})
    return next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)


def method_of(settings: Any) -> str | None:
    method = settings.get("quant_method") or settings.get("format") if isinstance(settings, dict) else None
    return method if isinstance(method, str) else None


def read_format(checkpoint: Checkpoint) -> tuple[Format, Mapping[str, Any]] | None:
    """The format that a checkpoint's config names and that is read, with its settings; None for every other checkpoint."""
    settings = settings_of(checkpoint)
    form = FORMATS.get(method_of(settings) or "")
    return (form, settings) if form is not None and form.unsupported(settings) is None else None


def signs(checkpoint: Checkpoint) -> list[str]:
    """What says that weights are quantised, in a few words each; empty for a plain checkpoint."""
    found: list[str] = []
    settings = settings_of(checkpoint)
    if settings:
        method = method_of(settings)
        form = FORMATS.get(method or "")
        reason = form.unsupported(settings) if form else None
        found.append(f"quantization_config in config.json ({method or 'method not named'}{f': {reason}' if reason else ''})")
    named = [name for name in checkpoint.home if _named_as_quantised(name, checkpoint)]
    low = [name for name in checkpoint.home if is_low(checkpoint.info(name))]
    if low:
        found.append(f"{len(low)} tensor(s) of dtype {checkpoint.info(low[0]).dtype}, such as {low[0]}")
    if named and found:
        found.append(f"{len(named)} tensor(s) of scales or packed values, such as {named[0]}")
    elif named:
        found.append(f"tensors named as scales or packed values, such as {named[0]}")
    return found


def _named_as_quantised(name: str, checkpoint: Checkpoint) -> bool:
    if name.endswith(_PLAIN_ENDS) and "quant_" not in name:
        return False
    if _PACKED_NAME.search(name):
        return True
    scale = _SCALE_NAME.fullmatch(name)
    return scale is not None and any(scale["of"].removesuffix(".") + end in checkpoint.home for end in _SCALED_ENDS)


def is_low(info: TensorInfo) -> bool:
    """Whether a tensor cannot hold plain weights: fp8, sub-byte numbers, or an integer matrix called weight (others are index buffers)."""
    if info.dtype in dtypes.EDITABLE:
        return False
    packed = info.dtype in ("U8", "I8", "I32", "U32") and len(info.shape) >= 2 and info.name.endswith("weight")
    return info.dtype in dtypes.FP8 or info.dtype not in dtypes.READABLE or packed


def left_over(checkpoint: Checkpoint, found: Found) -> list[str]:
    """Tensors of a quantised checkpoint that its format does not explain."""
    explained = {name for tensor in found.tensors.values() for name in tensor.names} | found.beside
    problems = []
    for name in checkpoint.names:
        info = checkpoint.info(name)
        if name not in explained and (is_low(info) or _named_as_quantised(name, checkpoint)):
            problems.append(
                f"{checkpoint.role} ({checkpoint.title}): tensor {name} is {info.describe()}, which its quantization_config does not explain."
            )
    # They are all of one kind, mostly: the first says what there is to see.
    return problems[:1] if not found.problems else []
