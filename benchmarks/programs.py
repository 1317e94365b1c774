"""The peers of `harden`, each a whole program on the same files: what it is compared with.

floor         reads both checkpoints and writes one, no SVD: the same streaming, nothing computed
full_svd      the same streaming engine with torch.linalg.svd in place of the truncated SVD
whole_models  LoX with everything in memory: torch.linalg.svd of every matrix in float32, edited in place, one model saved; as lean as it gets
lox_script    the steps of the LoX authors' script (github.com/VITA-Group/LoX, safety/LoX.py): both models loaded through transformers in
              bfloat16, all deltas, torch.linalg.svd of every matrix, Proj_k rebuilt from full factors, save_pretrained
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def floor(base: Path, aligned: Path, out: Path) -> None:
    """Reads every byte of both and writes aligned's tensors to new shards, tensor by tensor, fsynced; the least one can do."""
    import os

    from safetensors import safe_open
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    handles = {file.name: safe_open(file, "pt") for file in sorted(base.glob("*.safetensors"))}
    home = {name: file for file, handle in handles.items() for name in handle.keys()}  # noqa: SIM118
    for file in sorted(aligned.glob("*.safetensors")):
        tensors = {}
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                values = handle.get_tensor(name)
                other = handles[home[name]].get_tensor(name)
                tensors[name] = torch.where(other == values, values, values)  # touches every byte of both
        save_file(tensors, out / file.name, metadata={"format": "pt"})
        descriptor = os.open(out / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def full_svd(base: Path, aligned: Path, out: Path) -> None:
    """`harden` with every truncated SVD replaced by torch.linalg.svd in float32."""
    from lox_merge import harden
    from lox_merge.maths import spectral
    from lox_merge.maths.lanczos import Triplets

    def solve(matrix, rule, *_):  # type: ignore[no-untyped-def]
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        k = rule.from_shape(min(matrix.shape))
        return Triplets(left[:, :k].contiguous(), values[:k].double(), right[:k].T.contiguous(), float(values[k]), 0), "exact"

    spectral._solve = solve  # type: ignore[assignment]
    harden(base, aligned, out)


def whole_models(base: Path, aligned: Path, out: Path, rank: int = 6, alpha: float = 1.25) -> None:
    """Both models loaded whole, one matrix after another edited in place in their stored dtype, shards saved as they were."""
    from safetensors.torch import load_file, save_file

    before = {name: tensor for file in sorted(base.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    shards = {file.name: load_file(file) for file in sorted(aligned.glob("*.safetensors"))}
    for tensors in shards.values():
        for name, tensor in tensors.items():
            if tensor.ndim < 2:
                continue
            left, values, right = torch.linalg.svd(tensor.float() - before[name].float(), full_matrices=False)
            tensors[name] = (tensor.float() + alpha * (left[:, :rank] * values[:rank]) @ right[:rank]).to(tensor.dtype)
    out.mkdir(parents=True, exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, out / name, metadata={"format": "pt"})


def lox_script(base: Path, aligned: Path, out: Path, rank: int = 6, alpha: float = 1.25) -> None:
    """LoX in the steps, dtypes and order of memory of its authors' script."""
    from transformers import AutoModelForCausalLM

    edited = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.bfloat16)
    after = edited.state_dict()
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).state_dict()
    deltas = {name: after[name] - before[name] for name in after}
    weights = {}
    for name, delta in deltas.items():
        weights[name] = after[name]
        if delta.ndim > 1:
            left, values, right = torch.linalg.svd(delta.float(), full_matrices=False)
            values[rank:] = 0
            weights[name] = after[name] + alpha * (left @ torch.diag(values) @ right)
    edited.load_state_dict(weights)
    edited.save_pretrained(out)


if __name__ == "__main__":
    {"floor": floor, "full_svd": full_svd, "whole_models": whole_models, "lox_script": lox_script}[sys.argv[1]](*map(Path, sys.argv[2:5]))
