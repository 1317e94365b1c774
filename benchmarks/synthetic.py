"""Synthetic base/aligned pairs of real shapes for timing whole programs: bf16 Llama shapes, delta = power law + rounding noise.

The delta of every matrix has ||Δ||/||W|| of about 0.7 %: 64 directions with singular values i^-0.8, plus Gaussian noise,
rounded to bf16 as a trained checkpoint would be.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lox_merge.checkpoint.safetensors_format import build_header


@dataclass(frozen=True)
class Shapes:
    """A Llama's sizes."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    key_value: int
    shards: int

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        h, m = self.hidden, self.intermediate
        names: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (self.vocabulary, h))]
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            names += [
                (prefix + "self_attn.q_proj.weight", (h, h)),
                (prefix + "self_attn.k_proj.weight", (self.key_value, h)),
                (prefix + "self_attn.v_proj.weight", (self.key_value, h)),
                (prefix + "self_attn.o_proj.weight", (h, h)),
                (prefix + "mlp.gate_proj.weight", (m, h)),
                (prefix + "mlp.up_proj.weight", (m, h)),
                (prefix + "mlp.down_proj.weight", (h, m)),
                (prefix + "input_layernorm.weight", (h,)),
                (prefix + "post_attention_layernorm.weight", (h,)),
            ]
        return [*names, ("model.norm.weight", (h,)), ("lm_head.weight", (self.vocabulary, h))]


SIZES = {
    "tiny": Shapes(64, 128, 2, 256, 64, 2),
    "small": Shapes(256, 512, 4, 1000, 192, 2),
    "117M": Shapes(512, 2048, 20, 32000, 512, 4),
    "468M": Shapes(1024, 4096, 24, 32000, 1024, 4),
    "1B": Shapes(2048, 5632, 22, 32000, 256, 6),
    "7B-2-layers": Shapes(4096, 11008, 2, 32000, 4096, 2),
    "8B": Shapes(4096, 14336, 32, 128256, 1024, 4),
    "70B": Shapes(8192, 28672, 80, 128256, 1024, 30),
}


def matrix_pair(shape: tuple[int, ...], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A stored base and aligned matrix, bf16."""
    rows, columns = shape
    values = torch.arange(1, 65).float() ** -0.8
    base = (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()
    low = (torch.randn(rows, 64, generator=generator) * values) @ torch.randn(64, columns, generator=generator)
    low *= 0.006 * base.float().norm() / low.norm()
    noise = torch.randn(rows, columns, generator=generator) * (0.02 * 0.004)
    return base, (base.float() + low + noise).bfloat16()


def make_pair(folder: Path, size: str) -> tuple[Path, Path]:
    """Writes folder/base and folder/aligned unless they are there. Returns both paths."""
    shapes = SIZES[size]
    paths = folder / "base", folder / "aligned"
    if all((path / "model.safetensors.index.json").exists() for path in paths):
        return paths
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    names = shapes.tensors()
    per = -(-len(names) // shapes.shards)
    weight_map: dict[str, str] = {}
    for shard in range(shapes.shards):
        file = f"model-{shard + 1:05d}-of-{shapes.shards:05d}.safetensors"
        pair: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
        for name, shape in names[shard * per : (shard + 1) * per]:
            weight_map[name] = file
            if len(shape) == 1:
                tensors = torch.ones(shape).bfloat16(), (1 + 0.01 * torch.randn(shape, generator=generator)).bfloat16()
            else:
                tensors = matrix_pair(shape, generator)
            pair[0][name], pair[1][name] = tensors
        for path, tensors_of in zip(paths, pair, strict=True):
            save_file(tensors_of, path / file, metadata={"format": "pt"})
    total = sum(2 * torch.Size(shape).numel() for _, shape in names)
    for path in paths:
        _write_side_files(path, shapes, weight_map, total)
    return paths


def make_outline(folder: Path, size: str) -> tuple[Path, Path]:
    """A pair of this size for planning: whole headers, and weights that are holes in sparse files, read as zeros."""
    shapes = SIZES[size]
    names = shapes.tensors()
    per = -(-len(names) // shapes.shards)
    paths = folder / "base", folder / "aligned"
    for path in paths:
        path.mkdir(parents=True)
        weight_map: dict[str, str] = {}
        for shard in range(-(-len(names) // per)):
            part = names[shard * per : (shard + 1) * per]
            header = build_header([(name, "BF16", shape) for name, shape in part], {"format": "pt"})
            file = f"model-{shard + 1:05d}-of-{shapes.shards:05d}.safetensors"
            weight_map |= {name: file for name, _ in part}
            with (path / file).open("wb") as opened:
                opened.write(header.raw)
                opened.truncate(header.file_size)
        _write_side_files(path, shapes, weight_map, sum(2 * torch.Size(shape).numel() for _, shape in names))
    return paths


def _write_side_files(path: Path, shapes: Shapes, weight_map: dict[str, str], total: int) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shapes.hidden,
        "intermediate_size": shapes.intermediate,
        "num_hidden_layers": shapes.layers,
        "num_attention_heads": shapes.hidden // 64,
        "num_key_value_heads": shapes.key_value // 64,
        "vocab_size": shapes.vocabulary,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def make_finetuned(aligned: Path, folder: Path) -> Path:
    """Writes a model fine-tuned from `aligned` unless it is there: ||Δ_ft||/||W|| of about 0.4 %, 16 directions and noise. Returns `folder`."""
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    for file in sorted(aligned.glob("*.safetensors")):
        tensors = load_file(file)
        for name, values in tensors.items():
            change = torch.randn(values.shape, generator=generator) * 1e-5
            if values.ndim == 2:
                rows, columns = values.shape
                low = torch.randn(rows, 16, generator=generator) @ torch.randn(16, columns, generator=generator)
                change += low * (0.004 * values.float().norm() / low.norm())
            tensors[name] = (values.float() + change).bfloat16()
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
    for name in ("config.json", "model.safetensors.index.json"):
        (folder / name).write_text((aligned / name).read_text())
    return folder
