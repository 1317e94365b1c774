"""Checkpoints of any apparent size that take almost no disk: real headers and an index, holes where the weights would be.

A hole reads as zeros, so the delta of a tensor without data is zero and the tensor is copied. `filled` tensors get data, so that their
deltas are decomposed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from shapes import Model

from lox_merge.checkpoint.safetensors_format import Header, build_header

# (base, aligned) of a matrix's shape.
Pair = Callable[[tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]]


def shares(tensors: Sequence[tuple[str, tuple[int, ...]]], shards: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Tensors in their order over so many files of about equal bytes."""
    total = sum(math.prod(shape) for _, shape in tensors)
    files: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    done = 0
    for name, shape in tensors:
        if files[-1] and len(files) < shards and done >= total * len(files) / shards:
            files.append([])
        files[-1].append((name, shape))
        done += math.prod(shape)
    return files


def write_header(path: Path, tensors: Iterable[tuple[str, tuple[int, ...]]], code: str = "BF16") -> Header:
    """A file with this header, and a hole of the size of its tensors."""
    header = build_header([(name, code, shape) for name, shape in tensors], {"format": "pt"})
    with path.open("wb") as file:
        file.write(header.raw)
        file.truncate(header.file_size)
    return header


def fill(path: Path, header: Header, name: str, values: torch.Tensor) -> None:
    """Data for one tensor, or for its beginning where `values` has fewer entries."""
    with path.open("r+b") as file:
        file.seek(header.tensors[name].begin)
        file.write(values.contiguous().view(-1).view(torch.uint8).numpy().data)


def make_sparse_pair(
    folder: Path,
    model: Model,
    shards: int,
    *,
    filled: Callable[[str], bool] = lambda name: False,
    pair: Pair | None = None,
    base_code: str = "BF16",
) -> tuple[Path, Path]:
    """folder/base and folder/aligned, the latter in bf16. filled: which matrices get data, of `pair`. Returns both paths.

    Without `pair`, the first entry of the smallest matrix of every file is 1 in aligned: two models with equal weights are refused.
    """
    paths = folder / "base", folder / "aligned"
    for path in paths:
        path.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    parts = shares(model.tensors(), shards)
    for position, tensors in enumerate(parts):
        file = f"model-{position + 1:05d}-of-{len(parts):05d}.safetensors"
        weight_map |= dict.fromkeys((name for name, _ in tensors), file)
        headers = [write_header(path / file, tensors, code) for path, code in zip(paths, (base_code, "BF16"), strict=True)]
        matrices = [(name, shape) for name, shape in tensors if len(shape) == 2]
        if pair is None and matrices:
            smallest = min(matrices, key=lambda tensor: math.prod(tensor[1]))[0]
            fill(paths[1] / file, headers[1], smallest, torch.ones(1).bfloat16())
        for name, shape in matrices if pair is not None else ():
            if filled(name):
                for path, header, values in zip(paths, headers, pair(shape), strict=True):
                    fill(path / file, header, name, values)
    total = sum(2 * math.prod(shape) for _, shape in model.tensors())
    for path in paths:
        (path / "config.json").write_text(json.dumps(model.config() | {"dtype": "bfloat16"}))
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return paths


def apparent_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def disk_bytes(folder: Path) -> int:
    """What the files take on the disk, holes left out."""
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir())
