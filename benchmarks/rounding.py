"""How much of an edit survives writing bf16: gain and cosine by size of the delta, alpha and rounding (docs/numerics.md)."""

from __future__ import annotations

import torch

from lox_merge.maths.edits import lox_edit
from lox_merge.maths.rounding import Rounding

SIDE = 2048
SETTINGS = ((0.01, 1.0), (0.003, 1.0), (0.003, 0.5), (0.001, 1.0))
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic", "feedback")


def pair(relative: float) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 weights and a delta of power-law directions, half of its norm Gaussian, ||Δ||/||W|| = relative."""
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(SIDE, SIDE, generator=generator) * 0.02).bfloat16()
    left = torch.randn(SIDE, 64, generator=generator) * torch.arange(1, 65).float() ** -0.8
    low = left @ torch.randn(64, SIDE, generator=generator)
    size = relative * float(base.float().norm())
    low *= 0.87 * size / low.norm()
    noise = torch.randn(SIDE, SIDE, generator=generator) * (0.5 * size / SIDE)
    return base, (base.float() + low + noise).bfloat16()


def main() -> None:
    print("| ‖Δ‖/‖W‖, α | ‖T‖/‖W‖ |" + "".join(f" {rounding}: gain / cos |" for rounding in ROUNDINGS))
    print("|---|---|" + "---|" * len(ROUNDINGS))
    for relative, alpha in SETTINGS:
        base, aligned = pair(relative)
        cells = []
        for rounding in ROUNDINGS:
            realised = lox_edit(base, aligned, 6, alpha, rounding=rounding)[2]
            cells.append(f" {realised.gain:.3f} / {realised.cosine:.2f} |")
        share = realised.intended_norm / float(aligned.float().norm())
        print(f"| {relative:.1%}, {alpha:g} | {share:.3%} |" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
