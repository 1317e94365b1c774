"""Checkpoints to inspect: copies of one with every tensor changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Change = Callable[[str, torch.Tensor], torch.Tensor]


def rewritten(folder: Path, to: Path, change: Change) -> Path:
    """A copy of a checkpoint with every tensor changed; dtypes kept."""
    shutil.copytree(folder, to)
    for file in sorted(to.glob("*.safetensors")):
        save_file({name: change(name, values).to(values.dtype).contiguous() for name, values in load_file(file).items()}, file, {"format": "pt"})
    return to


def fine_tuned(aligned: Path, to: Path, seed: int = 1, size: float = 0.01) -> Path:
    generator = torch.Generator().manual_seed(seed)
    return rewritten(aligned, to, lambda _name, values: values.float() + size * torch.randn(values.shape, generator=generator))
