"""What of an edit survives writing it into a quantised form, and what a delta of quantised checkpoints is worth (docs/quantised.md).

Synthetic: bf16 weights and a delta of falling directions over noise, both models quantised by themselves as their makers do.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lox_merge.jobs.noise import RoundingNoise
from lox_merge.maths.edits import Realised, Update, apply_update, lox_update
from lox_merge.maths.grid import Codes, FloatCodes, Grid, WholeCodes, fresh_scales
from lox_merge.maths.spectral import truncated_svd

SIDE = 1024
SIZES = (0.01, 0.003, 0.001)
RANK, ALPHA = 6, 1.25


@dataclass(frozen=True)
class Form:
    """How a checkpoint is quantised. block: rows and columns that share a scale."""

    name: str
    codes: Codes
    largest: float
    block: tuple[int, int]

    def grid(self, values: Tensor) -> Grid:
        """The grid with the scales that these values get."""
        return Grid.of_blocks(self.codes, fresh_scales(values, self.block, self.largest), None, (values.shape[0], values.shape[1]), self.block)


FORMS = (
    Form("fp8, 128×128 blocks", FloatCodes(torch.float8_e4m3fn), 448, (128, 128)),
    Form("fp8, per channel", FloatCodes(torch.float8_e4m3fn), 448, (1, SIDE)),
    Form("int8, per channel", WholeCodes(8), 127, (1, SIDE)),
    Form("int4, groups of 128", WholeCodes(4), 7, (1, 128)),
)


def pair(relative: float, seed: int) -> tuple[Tensor, Tensor]:
    """bf16 weights and a delta of power-law directions, half of its norm Gaussian, ||Δ||/||W|| = relative."""
    # Far from the seeds of rounding: the same stream would correlate with it.
    generator = torch.Generator().manual_seed(1000 + seed)
    base = torch.randn(SIDE, SIDE, generator=generator) * 0.02
    left = torch.randn(SIDE, 64, generator=generator) * torch.arange(1, 65).float() ** -0.8
    low = left @ torch.randn(64, SIDE, generator=generator)
    size = relative * float(base.norm())
    low *= 0.87 * size / low.norm()
    noise = torch.randn(SIDE, SIDE, generator=generator) * (0.5 * size / SIDE)
    return base.bfloat16().float(), (base + low + noise).bfloat16().float()


def update_of(base: Tensor, aligned: Tensor) -> Update:
    return lox_update(truncated_svd(aligned - base, RANK), ALPHA)


def cosine(one: Update, other: Update) -> float:
    first, second = one.left @ one.right.T, other.left @ other.right.T  # type: ignore[union-attr, operator]
    return float((first * second).sum() / (first.norm() * second.norm()))


def fresh(aligned: Tensor, update: Update, form: Form) -> Realised:
    """Scales chosen anew for the edited weights, as by quantising the hardened model once more."""
    edited = aligned + update.left @ update.right.T  # type: ignore[union-attr, operator]
    return apply_update(aligned, update, grid=form.grid(edited))[1]


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def over_edge(base: Tensor, aligned: Tensor, form: Form) -> tuple[float, float]:
    """Largest singular value of what quantising both adds to their delta, as a share of the noise edge of that delta; and of the delta itself."""
    grids = form.grid(base), form.grid(aligned)
    low_base, low_aligned = (grid.round(values, slice(None)) for grid, values in zip(grids, (base, aligned), strict=True))
    delta = low_aligned - low_base
    edge = RoundingNoise(*grids).edge(low_base, low_aligned, delta)
    return largest_value(delta - (aligned - base)) / edge, largest_value(delta) / edge


def largest_value(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def edges(seeds: range) -> None:
    """Prints how noise and delta stand to the edge, for deltas of each size and for two models that have nothing in common."""
    print("\nlargest singular value over the noise edge: of what quantising adds / of the delta, means of the seeds (largest of the former)\n")
    print("| stored as | " + " | ".join([*(f"{relative:.1%}" for relative in SIZES), "unrelated"]) + " |")
    print("|---|" + "---|" * (len(SIZES) + 1))
    for form in FORMS:
        cells = []
        for relative in (*SIZES, None):
            found = []
            for seed in seeds:
                base, aligned = pair(relative or SIZES[0], seed)
                found.append(over_edge(base, aligned if relative else pair(SIZES[0], 100 + seed)[0], form))
            noise, delta = zip(*found, strict=True)
            cells.append(f"{mean(noise):.2f} / {mean(delta):.2f} ({max(noise):.2f})")
        print(f"| {form.name} | " + " | ".join(cells) + " |", flush=True)


WAYS: dict[str, Callable[[Tensor, Update, Form, Grid], Realised]] = {
    "kept, nearest": lambda aligned, update, form, grid: apply_update(aligned, update, grid=grid)[1],
    "kept, stochastic": lambda aligned, update, form, grid: apply_update(aligned, update, grid=grid, rounding="stochastic")[1],
    "kept, feedback": lambda aligned, update, form, grid: apply_update(aligned, update, grid=grid, rounding="feedback")[1],
    "fresh, nearest": lambda aligned, update, form, grid: fresh(aligned, update, form),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only-edges", action="store_true", help="only where noise ends")
    arguments = parser.parse_args()
    seeds = range(arguments.seeds)
    if not arguments.only_edges:
        survival(seeds)
    edges(seeds)


def survival(seeds: range) -> None:
    """Prints what is left of edits, and what deltas of quantised checkpoints are worth."""
    print(f"{SIDE}×{SIDE}, rank {RANK}, alpha {ALPHA}, means of {len(seeds)} seeds. Requantised: gain / cos / ‖R‖/‖T‖. Adapter: 1 / 1 / 1.\n")
    print("| stored as | ‖Δ‖/‖W‖ | ‖T‖/‖W‖ |" + "".join(f" {way} |" for way in WAYS))
    print("|---|---|---|" + "---|" * len(WAYS))
    worth: list[str] = []
    for form in FORMS:
        for relative in SIZES:
            shares: list[float] = []
            found: dict[str, list[Realised]] = {way: [] for way in WAYS}
            cosines: dict[str, list[float]] = {"both": [], "base": [], "aligned": []}
            for seed in seeds:
                base, aligned = pair(relative, seed)
                true = update_of(base, aligned)
                every = slice(None)
                grid = form.grid(aligned)
                low_base, low_aligned = form.grid(base).round(base, every), grid.round(aligned, every)
                update = update_of(low_base, low_aligned)
                cosines["both"].append(cosine(update, true))
                cosines["base"].append(cosine(update_of(low_base, aligned), true))
                cosines["aligned"].append(cosine(update_of(base, low_aligned), true))
                # Judged on the true edit: what writing loses, whatever the delta was worth.
                shares.append(true.norm(None) / float(aligned.norm()))
                for way, write in WAYS.items():
                    found[way].append(write(low_aligned, true, form, grid))
            cells = "".join(f" {_three(results)} |" for results in found.values())
            print(f"| {form.name} | {relative:.1%} | {mean(shares):.3%} |{cells}", flush=True)
            worth.append(f"| {form.name} | {relative:.1%} |" + "".join(f" {mean(values):.2f} |" for values in cosines.values()))
    print("\ncos of the edit computed from quantised checkpoints with the edit computed from the bf16 ones\n")
    print("| stored as | ‖Δ‖/‖W‖ | both quantised | base alone | aligned alone |\n|---|---|---|---|---|")
    print("\n".join(worth))


def _three(results: list[Realised]) -> str:
    gain = mean([result.gain or 0.0 for result in results])
    cosines = mean([result.cosine or 0.0 for result in results])
    ratio = mean([result.realised_norm / result.intended_norm if result.intended_norm else math.nan for result in results])
    return f"{gain:.3f} / {cosines:.2f} / {ratio:.1f}"


if __name__ == "__main__":
    main()
