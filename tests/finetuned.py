"""A third checkpoint for the projection filter: tiny aligned models with a random change on every tensor, and the filter in float64."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Change = Callable[[str, torch.Tensor], torch.Tensor]
_CONV1D = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")


def finetune(aligned: Path, out: Path, change: Change | None = None, *, size: float = 0.03, seed: int = 5) -> Path:
    """A copy of `aligned` whose tensors are `change(name, tensor)`; by default each gets Gaussian noise of `size` times its spread."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(_: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() + size * (tensor.float().std().nan_to_num() + 0.1) * torch.randn(tensor.shape, generator=generator)

    shutil.copytree(aligned, out)
    for file in sorted(out.glob("*.safetensors")):
        tensors = {name: (change or noisy)(name, tensor).to(tensor.dtype).contiguous() for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return out


def filtered_matrix(
    base: torch.Tensor, aligned: torch.Tensor, finetuned: torch.Tensor, fraction: float, mode: str, *, side: str = "left", transposed: bool = False
) -> torch.Tensor:
    """Eq. 5 or 6 in float64 by a full SVD; left is the side of the layer's outputs. transposed: stored as (d_in, d_out)."""
    base, aligned, finetuned = base.double(), aligned.double(), finetuned.double()
    if transposed:
        return filtered_matrix(base.T, aligned.T, finetuned.T, fraction, mode, side=side).T
    change = finetuned - aligned
    left, _, right = torch.linalg.svd(aligned - base, full_matrices=False)
    k = max(1, round(fraction * min(base.shape)))
    inside = left[:, :k] @ (left[:, :k].T @ change) if side == "left" else (change @ right[:k].T) @ right[:k]
    return aligned + inside if mode == "parallel" else aligned + change - inside


def filtered_tensor(
    name: str, base: torch.Tensor, aligned: torch.Tensor, finetuned: torch.Tensor, fraction: float, mode: str, *, side: str = "left", kind: str = ""
) -> torch.Tensor:
    """A stored tensor of any layout of tests/tiny_models.py. kind: the architecture."""
    if aligned.ndim == 1:
        u, v = (finetuned.double() - aligned.double()), (aligned.double() - base.double())
        inside = (u @ v) / (v @ v) * v if float(v.norm()) else torch.zeros_like(v)
        return aligned.double() + (inside if mode == "parallel" else u - inside)
    if aligned.ndim == 2:
        conv1d = kind == "gpt2" and _CONV1D.search(name) is not None
        return filtered_matrix(base, aligned, finetuned, fraction, mode, side=side, transposed=conv1d)
    if aligned.ndim > 3 or "expert" not in name:
        flat = (part.reshape(part.shape[0], -1) for part in (base, aligned, finetuned))
        return filtered_matrix(*flat, fraction, mode, side=side).reshape(aligned.shape)
    assert kind in ("gpt_oss", "stacked")
    experts = []
    for stored in zip(base, aligned, finetuned, strict=True):
        out = torch.empty(stored[1].shape, dtype=torch.float64)
        columns = kind == "gpt_oss"  # (d_in, d_out), gate and up in turns; else (d_out, d_in), one after the other
        half = out.shape[0] // 2
        parts = [slice(0, None, 2), slice(1, None, 2)] if columns else [slice(0, half), slice(half, None)]
        for part in parts if "gate_up" in name else [slice(None)]:
            where = (slice(None), part) if columns else (part, slice(None))
            out[where] = filtered_matrix(*(tensor[where] for tensor in stored), fraction, mode, side=side, transposed=columns)
        experts.append(out)
    return torch.stack(experts)
