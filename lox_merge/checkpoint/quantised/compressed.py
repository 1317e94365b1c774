"""Checkpoints of compressed-tensors: fp8 and int8 weights, and integers packed into words of 32 bits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.checkpoint.files import LocalFolder
from lox_merge.checkpoint.quantised.schemes import METHOD, Scheme, read_schemes, scheme_of
from lox_merge.checkpoint.quantised.stored import WORD, Found, Layout, StoredTensor

_SCALES = frozenset({"F32", "BF16", "F16"})
_SHAPES = (("I64", (2,)), ("I32", (2,)))
_ZEROS = frozenset({"I8", "I32"})
_CODES = {"float-quantized": ("weight", "F8_E4M3"), "int-quantized": ("weight", "I8"), "pack-quantized": ("weight_packed", "I32")}
_LAYOUTS: dict[str, Layout] = {"float-quantized": "float8", "int-quantized": "int8", "pack-quantized": "packed"}
_TABLES = ("weight_scale", "weight_zero_point", "weight_shape")
# Of activations and caches: they say nothing about a weight.
_BESIDE = re.compile(r"\.(input|output|k|v|q)_(scale|zero_point|global_scale)$|\.weight_observer\.|\.[kvq]_proj\.output_(scale|zero_point)$")


def describe(settings: Mapping[str, Any]) -> str:
    schemes, _ = read_schemes(settings)
    return f"{METHOD} " + "; ".join(dict.fromkeys(scheme.describe() for scheme in schemes))


def unsupported(settings: Mapping[str, Any]) -> str | None:
    """Why these settings are not read; None where they are."""
    return read_schemes(settings)[1]


def find(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Found:
    """Every quantised weight, from headers. A module that is ignored has a plain weight and no scales, whatever the config says."""
    found = Found()
    schemes, _ = read_schemes(settings)
    where = f"{checkpoint.role} ({checkpoint.title})"
    claimed: set[str] = set()
    orphans: set[str] = set()
    for name in checkpoint.names:
        module, _, leaf = name.rpartition(".")
        if _BESIDE.search(name):
            found.beside.add(name)
        elif leaf == "weight_packed" or (leaf == "weight" and checkpoint.info(name).dtype in ("F8_E4M3", "I8")):
            scheme = scheme_of(module, schemes)
            if scheme is None:
                found.problems.append(f"{where}: {name} is quantised, but no group of quantization_config targets {module}.")
                continue
            tensor = _tensor(checkpoint, module, name, scheme, found, where)
            if tensor is not None:
                found.tensors[tensor.name] = tensor
                claimed.update(tensor.names)
    for name in checkpoint.names:
        leaf = name.rpartition(".")[2]
        if leaf == "weight_g_idx":
            found.problems.append(
                f"{where}: {name} permutes groups of columns (actorder 'group'), which is not read. Give the unquantised checkpoint."
            )
        elif leaf in _TABLES and name not in claimed:
            orphans.add(name)
    found.beside |= orphans
    if orphans and not found.problems:
        first = min(orphans)
        found.problems.append(f"{where}: {first} ({len(orphans)} such) belongs to no quantised weight. Download or save the checkpoint again.")
    return found


def _tensor(checkpoint: Checkpoint, module: str, codes: str, scheme: Scheme, found: Found, where: str) -> StoredTensor | None:
    leaf, dtype = _CODES[scheme.format]
    info = checkpoint.info(codes)
    if codes != f"{module}.{leaf}" or info.dtype != dtype or len(info.shape) != 2:
        found.problems.append(f"{where}: tensor {codes} is {info.describe()}; {scheme.format} stores {module}.{leaf} as a matrix of {dtype}.")
        return None
    scale, zero, shape_in = f"{module}.weight_scale", f"{module}.weight_zero_point", f"{module}.weight_shape"
    packed = scheme.format == "pack-quantized"
    rows, columns = info.shape
    if packed:
        columns = _columns(checkpoint, scheme, columns * WORD // scheme.bits, scale, shape_in)
    tensor = StoredTensor(
        name=f"{module}.weight",
        shape=(rows, columns),
        codes=codes,
        scale=scale,
        layout=_LAYOUTS[scheme.format],
        block=scheme.block(rows, columns),
        dtype=dtype,
        bits=scheme.bits,
        # Of a symmetric scheme they are all zero, where they are stored at all.
        zero=zero if zero in checkpoint or not scheme.symmetric else None,
        shape_in=shape_in if shape_in in checkpoint else None,
    )
    if tensor.shape_in is not None and (checkpoint.info(shape_in).dtype, checkpoint.info(shape_in).shape) not in _SHAPES:
        found.problems.append(f"{where}: {shape_in} is {checkpoint.info(shape_in).describe()}, not two whole numbers. Save the checkpoint again.")
    if packed and -(-columns * scheme.bits // WORD) != info.shape[1]:
        found.problems.append(f"{where}: {codes} is {info.describe()}, which does not hold {columns} columns of {scheme.bits} bits. Save it again.")
    found.check_table(scale, "scale", checkpoint.info(scale) if scale in checkpoint else None, tensor, _SCALES, where)
    if tensor.zero is not None:
        there = checkpoint.info(zero) if zero in checkpoint else None
        if packed and there is not None and there.dtype == "I32":
            high = -(-tensor.scales_shape[0] * scheme.bits // WORD)
            if there.shape != (high, tensor.scales_shape[1]):
                found.problems.append(f"{where}: the zero point {zero} is {there.describe()}, not {[high, tensor.scales_shape[1]]}. Save it again.")
        else:
            found.check_table(zero, "zero point", there, tensor, _ZEROS, where)
    return tensor


def _columns(checkpoint: Checkpoint, scheme: Scheme, most: int, scale: str, shape_in: str) -> int:
    """Columns of a packed weight: its last word may be part empty. Whole groups say how many, weight_shape does where it is on this
    machine, and it is compared with what was assumed when the weight is decoded."""
    known = shape_in in checkpoint and (checkpoint.info(shape_in).dtype, checkpoint.info(shape_in).shape) in _SHAPES
    if known and isinstance(checkpoint.source, LocalFolder):
        columns = int(checkpoint.tensor(shape_in)[1])
        return columns if 0 <= columns <= most else most
    if scheme.strategy == "group" and scale in checkpoint and len(checkpoint.info(scale).shape) == 2:
        return min(most, checkpoint.info(scale).shape[1] * scheme.size[1])
    return most
