"""How far two computations of one edit may lie apart, and do: other thread counts, other devices.

Two runs start from the same weights, so what they may differ by follows from their own certificates: each computed Proj_k(Δ) lies within its
bound of the true one, the rest is float32 arithmetic, and rounding to a stored dtype moves an entry by one neighbour at most beside that.
tests/test_determinism.py holds the bound; this file measures:
    python benchmarks/agreement.py
    python benchmarks/agreement.py --devices cpu cuda
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lox_merge.maths.edits import lox_edit
from lox_merge.maths.precision import frobenius_norm

SHAPES = [(1024, 4096), (4096, 4096), (2048, 7168), (14336, 4096)]


def allowed(written: Tensor, delta_norm: float, alpha: float, rank: int, bounds: tuple[float | None, float | None]) -> float | None:
    """Largest ‖first − second‖_F of two written float32 matrices W + alpha · Proj_k(Δ); None where a bound does not exist (no gap).

    bounds: projection_error_bound of both certificates. Beside them: sums of n products in float32 err by about eps · √n of the norms
    (Higham 2002, sec. 2.8), once in the triplets and once in the update, and the written value itself by half an eps.
    """
    if bounds[0] is None or bounds[1] is None:
        return None
    eps = torch.finfo(torch.float32).eps
    terms = math.sqrt(max(written.shape)) + rank
    return alpha * (bounds[0] + bounds[1]) + 2 * eps * (frobenius_norm(written) + 2 * alpha * terms * delta_norm)


@dataclass(frozen=True)
class Apart:
    """How far two written matrices of one dtype are apart. difference: ‖·‖_F; differing: share of the entries that are not equal;
    neighbours: largest difference beyond what the values before rounding differ by, in units in the last place (0 for float32)."""

    same_bytes: bool
    difference: float
    differing: float
    neighbours: float


def apart(first: Tensor, second: Tensor, before: tuple[Tensor, Tensor] | None = None) -> Apart:
    """Compares matrices on the CPU. before: the same two before rounding, in float32."""
    gap = (first.double() - second.double()).abs()
    neighbours = 0.0
    if before is not None:
        # The spacing at the larger of both: eps times the power of two below it.
        larger = torch.maximum(first.abs(), second.abs()).double()
        spacing = torch.finfo(first.dtype).eps * torch.exp2(torch.floor(torch.log2(larger.clamp_min(torch.finfo(first.dtype).tiny))))
        beyond = gap - (before[0].double() - before[1].double()).abs()
        neighbours = float((beyond / spacing).max().clamp_min(0))
    return Apart(torch.equal(first, second), float(gap.norm()), float((gap != 0).double().mean()), neighbours)


def computed(
    base: Tensor, aligned: Tensor, dtype: torch.dtype, device: str, threads: int, *, rank: int, alpha: float
) -> tuple[Tensor, float | None, float]:
    """One edit: the matrix on the CPU, the certificate's bound, ‖Δ‖_F."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        edited, subspace, _ = lox_edit(base.to(device), aligned.to(device), rank, alpha, dtype=dtype)
    finally:
        torch.set_num_threads(before)
    assert subspace is not None
    return edited.cpu(), subspace.certificate.projection_error_bound, subspace.norm


def measure(shape: tuple[int, int], first: tuple[str, int], second: tuple[str, int], *, rank: int, alpha: float) -> dict[str, object]:
    """Two computations (device, threads) of one pair of this shape, in float32 and bf16."""
    from synthetic import matrix_pair

    base, aligned = matrix_pair(shape, torch.Generator().manual_seed(0))
    wide = [computed(base, aligned, torch.float32, *one, rank=rank, alpha=alpha) for one in (first, second)]
    narrow = [computed(base, aligned, torch.bfloat16, *one, rank=rank, alpha=alpha)[0] for one in (first, second)]
    bound = allowed(wide[0][0], wide[0][2], alpha, rank, (wide[0][1], wide[1][1]))
    size = frobenius_norm(wide[0][0] - aligned.float())
    one, other = apart(wide[0][0], wide[1][0]), apart(narrow[0], narrow[1], (wide[0][0], wide[1][0]))
    print(
        f"{shape[0]:6d} × {shape[1]:<6d} {first[0]}/{first[1]} against {second[0]}/{second[1]}: float32 {one.difference / size:.1e} of the update "
        f"(allowed {(bound or math.nan) / size:.1e}); bf16 {other.differing:.1e} of the entries, by {other.neighbours:.0f} unit in the last place",
        flush=True,
    )
    ways = {"first": list(first), "second": list(second)}
    return {"shape": list(shape), **ways, "update_norm": size, "allowed": bound, "float32": asdict(one), "bfloat16": asdict(other)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=["cpu"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rank", type=int, default=6)
    parser.add_argument("--alpha", type=float, default=1.25)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, torch {torch.__version__}")
    ways = [("cpu", threads) for threads in arguments.threads] + [(device, 1) for device in arguments.devices if device != "cpu"]
    settings = {"rank": arguments.rank, "alpha": arguments.alpha}
    rows = [measure(shape, ways[0], way, **settings) for shape in SHAPES for way in ways[1:]]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
