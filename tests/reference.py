"""LoX in float64 by full SVD, written independently of the package: what a hardened checkpoint has to hold."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from safetensors import safe_open


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    return tensors


def header(file: Path) -> bytes:
    data = file.read_bytes()
    return data[: 8 + struct.unpack("<Q", data[:8])[0]]


def stored_bytes(folder: Path) -> dict[str, bytes]:
    """Raw bytes of every tensor by name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw, data = header(file), file.read_bytes()
        for name, entry in json.loads(raw[8:]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = data[len(raw) + begin : len(raw) + end]
    return found


def lox_matrix(base: torch.Tensor, aligned: torch.Tensor, k: int, alpha: float) -> torch.Tensor:
    """The authors' update, W_align + coef · U[:, :k] S V, in float64."""
    left, values, right = torch.linalg.svd(aligned.double() - base.double(), full_matrices=False)
    return aligned.double() + alpha * (left[:, :k] @ torch.diag(values[:k]) @ right[:k])


def lox_tensor(
    name: str, base: torch.Tensor, aligned: torch.Tensor, k: int = 6, alpha: float = 1.25, *, gpt_oss: bool = False, experts_of_dbrx: int = 0
) -> torch.Tensor:
    """Stored tensor of any layout: vectors as they are, experts and heads one by one, fused gate and up apart, convolutions flattened."""
    if experts_of_dbrx and "experts.mlp." in name:
        parts = zip(base.chunk(experts_of_dbrx), aligned.chunk(experts_of_dbrx), strict=True)
        return torch.cat([lox_matrix(one, other, k, alpha) for one, other in parts])
    if aligned.ndim == 2:
        return lox_matrix(base, aligned, k, alpha)
    if sum(side > 1 for side in aligned.shape) < 2:
        return aligned.double()
    heads = name.endswith(("gate_weight", "x_proj_weight", "dt_proj_weight"))
    of_experts = any(word in name for word in ("expert", ".moe.", "block_sparse_moe", "mlp.input_linear", "mlp.output_linear"))
    if aligned.ndim == 3 and (heads or of_experts):
        across = "experts.fc1" in name or (aligned.shape[1] < aligned.shape[2] and "gate_up_proj" in name and not gpt_oss)
        if across:  # stored for x @ W: halves of the columns
            return lox_tensor(name.replace("fc1", "gate_up_proj"), base.mT, aligned.mT, k, alpha).mT
        experts = []
        for one, other in zip(base, aligned, strict=True):
            if not any(word in name for word in ("gate_up_proj", "block_sparse_moe.input_linear", "mlp.input_linear")):
                experts.append(lox_matrix(one, other, k, alpha))
            elif gpt_oss:
                out = torch.empty(other.shape, dtype=torch.float64)
                for start in (0, 1):
                    out[:, start::2] = lox_matrix(one[:, start::2], other[:, start::2], k, alpha)
                experts.append(out)
            else:
                half = other.shape[0] // 2
                experts.append(torch.cat([lox_matrix(one[:half], other[:half], k, alpha), lox_matrix(one[half:], other[half:], k, alpha)]))
        return torch.stack(experts)
    rows = next(side for side in aligned.shape if side > 1)  # ones in front of it are none
    flat = lox_matrix(base.reshape(rows, -1), aligned.reshape(rows, -1), k, alpha)
    return flat.reshape(aligned.shape)


def assert_equals_to_rounding(out: torch.Tensor, exact: torch.Tensor, label: str = "") -> None:
    """`out` is `exact` rounded to its dtype, but for values that float32 arithmetic moved across a midpoint."""
    error = (out.double() - exact).abs()
    if out.dtype == torch.float32:
        assert float(error.max()) <= 1e-6 * float(exact.abs().max()), label
        return
    half_spacing = exact.abs() * torch.finfo(out.dtype).eps / 2
    assert (error <= 1.01 * half_spacing + 1e-7).all(), label
    # Where the whole delta is added, many sums lie at a midpoint itself: alpha times a few units in the last place.
    midpoint = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 1) * torch.finfo(out.dtype).eps / 2
    at_midpoint = (error - midpoint).abs() <= 1e-7 * float(exact.abs().max())
    assert int(((out != exact.to(out.dtype)) & ~at_midpoint).sum()) <= max(3, 0.01 * out.numel()), label
