"""Plain checkpoints stored in quantised forms, written out in numpy and float64: nothing of the package encodes here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_pair

from lox_merge.checkpoint.checkpoint import open_checkpoint
from lox_merge.checkpoint.quantised.view import as_quantised

INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]
BLOCK = (16, 16)


def block_fp8(weight: torch.Tensor, block: tuple[int, int] = BLOCK, *, powers: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """F8_E4M3 codes and float32 scales of blocks; powers: scales rounded up to powers of two, as DeepSeek-V3.1 does."""
    rows, columns = weight.shape
    high, wide = -(-rows // block[0]), -(-columns // block[1])
    scales = torch.empty(high, wide)
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(high):
        for j in range(wide):
            place = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale = weight[place].float().abs().max() / 448
            scales[i, j] = 2 ** torch.ceil(torch.log2(scale)) if powers else scale
            codes[place] = (weight[place].float() / scales[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scales


def block_values(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] = BLOCK) -> np.ndarray:
    """float64 values of blocks."""
    expanded = np.kron(scales.double().numpy(), np.ones(block))[: codes.shape[0], : codes.shape[1]]
    return codes.double().numpy() * expanded


def as_block_fp8(folder: Path, out: Path, *, ignore: tuple[str, ...] = ("lm_head",), powers: bool = False, block: tuple[int, int] = BLOCK) -> Path:
    """A copy of a checkpoint with every linear layer in fp8, scales beside it in the same file."""

    def store(name: str, tensor: torch.Tensor) -> Tensors:
        codes, scales = block_fp8(tensor, block, powers=powers)
        return {name: codes, name + "_scale_inv": scales}

    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    settings |= {"modules_to_not_convert": list(ignore)} | ({"scale_fmt": "ue8m0"} if powers else {})
    return rewrite(folder, out, store, settings, ignore)


def scheme(form: str, bits: int, strategy: str, *, symmetric: bool = True, group: int | None = None) -> dict[str, Any]:
    """quantization_config as llm-compressor writes it."""
    weights = {
        "num_bits": bits,
        "type": "float" if form == "float-quantized" else "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group,
        "dynamic": False,
        "observer": "minmax",
    }
    # The library takes int8 without activations for words of 32 bits, whatever the format says.
    kind = {"num_bits": 8, "type": weights["type"], "symmetric": True, "strategy": "token", "dynamic": True, "observer": None}
    inputs = None if form == "pack-quantized" else kind
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None, "format": form}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"], "quantization_status": "compressed"}


def packed_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words, by Python's own whole numbers: code + 2^(bits − 1), lowest bits first."""
    per = 32 // bits
    rows = []
    for row in codes.tolist():
        words = []
        for start in range(0, len(row), per):
            word = sum((code + 2 ** (bits - 1)) << (bits * place) for place, code in enumerate(row[start : start + per]))
            words.append(word - 2**32 if word >= 2**31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def whole_codes(weight: torch.Tensor, bits: int, group: int, *, symmetric: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int8 codes, bf16 scales (rows, groups) and int8 zero points of groups of columns."""
    rows, columns = weight.shape
    parts = weight.float().view(rows, columns // group, group)
    low, high = parts.amin(-1).clamp_max(0), parts.amax(-1).clamp_min(0)
    smallest, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        scales = (torch.maximum(-low, high) / largest).bfloat16()
        zeros = torch.zeros_like(low)
    else:
        scales = ((high - low) / (largest - smallest)).bfloat16()
        zeros = (smallest - low / scales.float()).round().clamp(smallest, largest)
    codes = (parts / scales.float().unsqueeze(-1) + zeros.unsqueeze(-1)).round().clamp(smallest, largest)
    return codes.view(rows, columns).to(torch.int8), scales, zeros.to(torch.int8)


def as_packed(folder: Path, out: Path, *, group: int = 16, symmetric: bool = True) -> Path:
    """A copy with linear layers as int4 packed into words."""

    def store(name: str, tensor: torch.Tensor) -> Tensors:
        codes, scales, zeros = whole_codes(tensor, 4, group, symmetric=symmetric)
        found = {name + "_packed": packed_words(codes, 4), name + "_scale": scales, name + "_shape": torch.tensor(tensor.shape)}
        return found if symmetric else found | {name + "_zero_point": packed_words(zeros.T, 4).T.contiguous()}

    return rewrite(folder, out, store, scheme("pack-quantized", 4, "group", symmetric=symmetric, group=group))


def as_int8(folder: Path, out: Path) -> Path:
    """A copy with linear layers as int8, one scale a row."""

    def store(name: str, tensor: torch.Tensor) -> Tensors:
        codes, scales, _ = whole_codes(tensor, 8, tensor.shape[1])
        return {name: codes, name + "_scale": scales}

    return rewrite(folder, out, store, scheme("int-quantized", 8, "channel"))


def as_float8(folder: Path, out: Path, strategy: str = "channel") -> Path:
    """A copy with linear layers as compressed-tensors stores fp8: one scale a row, or one for all."""

    def store(name: str, tensor: torch.Tensor) -> Tensors:
        codes, scales = block_fp8(tensor, (1, tensor.shape[1]) if strategy == "channel" else (tensor.shape[0], tensor.shape[1]))
        return {name: codes, name + "_scale": scales if strategy == "channel" else scales.view(1)}

    return rewrite(folder, out, store, scheme("float-quantized", 8, strategy))


def rewrite(folder: Path, out: Path, store: Any, settings: dict[str, Any], ignore: tuple[str, ...] = ("lm_head",)) -> Path:
    """Copies a checkpoint; `store` gives what stands for each weight of a linear layer that is not ignored."""
    shutil.copytree(folder, out)
    places: dict[str, str] = {}
    size = 0
    for file in sorted(out.glob("*.safetensors")):
        tensors: Tensors = {}
        for name, tensor in load_file(file).items():
            linear = tensor.ndim == 2 and name.endswith("proj.weight") and not any(part in name for part in ignore)
            tensors |= store(name, tensor) if linear else {name: tensor}
        save_file(tensors, file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    config = json.loads((out / "config.json").read_text()) | {"quantization_config": settings}
    (out / "config.json").write_text(json.dumps(config))
    if (out / INDEX).exists():
        (out / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2))
    return out


def as_scales_apart(folder: Path, out: Path) -> Path:
    """A copy of a checkpoint in block-scaled fp8 with all scales in a file of their own."""
    shutil.copytree(folder, out)
    moved: Tensors = {}
    places: dict[str, str] = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors = load_file(file)
        moved |= {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
        save_file(tensors, file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
    save_file(moved, out / "scales.safetensors", metadata={"format": "pt"})
    places |= dict.fromkeys(moved, "scales.safetensors")
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return out


FORMS: dict[str, Callable[[Path, Path], Path]] = {"fp8": as_block_fp8, "int4": as_packed, "int8": as_int8, "float8": as_float8}


def pair_in_forms(folder: Path, forms: Iterable[str] = tuple(FORMS)) -> dict[str, Path]:
    """A pair of tiny models in `folder`, 'base' and 'aligned' (two shards), and both once more in every form: 'base-fp8', …"""
    base, aligned = make_pair(folder, "llama", aligned_shards=2)
    made = {"base": base, "aligned": aligned}
    return made | {f"{role}-{form}": FORMS[form](plain, folder / f"{role}-{form}") for form in forms for role, plain in made.items()}


def decoded_copy(quantised: Path, out: Path) -> Path:
    """A plain float32 checkpoint of what the codes and scales of a quantised one stand for."""
    shutil.copytree(quantised, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    found = as_quantised(open_checkpoint(quantised, "model"))
    save_file({name: found.tensor(name).clone() for name in found.names}, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out
