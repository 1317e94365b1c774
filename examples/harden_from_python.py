"""Hardening from Python: what `lox-merge harden` does, and the same edit on a single matrix.

python examples/harden_from_python.py            # on the built-in toy pair
python examples/harden_from_python.py BASE ALIGNED OUT
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from lox_merge import LoxMergeError, Recipe, harden, lox, truncated_svd


def on_files(base: str | Path, aligned: str | Path, out: str | Path) -> None:
    """A whole checkpoint, streamed from files to files."""
    recipe = Recipe(rank=6, alpha=1.25, exclude=("lm_head",), alpha_pattern=((r"mlp\.", 1.0),))
    result = harden(base, aligned, out, recipe=recipe)
    summary = result.summary
    print(f"{summary.edited_tensors} tensors edited, mean R_align {summary.mean_r_align:.3f}, realised gain {summary.realised_gain:.3f}")
    for tensor in result.manifest["tensors"][:3]:
        for matrix in tensor.get("matrices", ()):
            print(tensor["name"], "rank", matrix["rank"], "R_align", round(matrix["r_align"], 3), matrix["certificate"]["method"])


def on_one_matrix() -> None:
    """The pure functions: tensors in, tensors out."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(512, 256, generator=generator) * 0.02
    aligned = base + 0.01 * torch.outer(torch.randn(512, generator=generator), torch.randn(256, generator=generator)) / 16
    subspace = truncated_svd(aligned - base, 6)
    print(f"rank {subspace.rank}, R_align {subspace.alignment_ratio:.3f}, sin angle ≤ {subspace.certificate.angle_bound:.1e}")
    hardened = lox(base, aligned, rank=6, alpha=1.25)
    print(f"‖hardened − aligned‖ = {float((hardened - aligned).norm()):.4f}")


if __name__ == "__main__":
    on_one_matrix()
    if len(sys.argv) == 4:
        try:
            on_files(*sys.argv[1:])
        except LoxMergeError as error:
            # Its text says what is wrong and what to do next.
            sys.exit(f"error: {error}")
    else:
        from lox_merge.lab.checkpoints import toy_pair

        pair = toy_pair()
        with tempfile.TemporaryDirectory() as folder:
            on_files(pair.base, pair.aligned, Path(folder) / "hardened")
