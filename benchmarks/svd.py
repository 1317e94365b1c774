"""One delta: truncated SVD against torch.linalg.svd and against randomised SVD, time and error of Proj_6.

--layer: every matrix of one layer of 7B shape, from two stored matrices to the edited one, in memory: what LoX takes with either SVD.
--panels: both products of an iteration with panels of columns that stay in the cache, against one product after the other.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from measure import median_seconds
from synthetic import matrix_pair

from lox_merge.jobs.work import form_delta
from lox_merge.maths import lanczos, truncated_svd
from lox_merge.maths.edits import lox_edit


def delta(side: int, exponent: float, noise: float, relative: float, seed: int = 0) -> torch.Tensor:
    """A delta of bf16 weights: directions i^-exponent, a share `noise` of Gaussian entries, ||Δ||/||W|| = relative, rounded."""
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(side, side, generator=generator) * 0.02).bfloat16()
    values = torch.arange(1, 129).float() ** -exponent
    left = torch.linalg.qr(torch.randn(side, 128, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(side, 128, generator=generator)).Q
    low = (left * values) @ right.T
    size = relative * float(base.float().norm())
    low *= (1 - noise**2) ** 0.5 * size / low.norm()
    aligned = (base.float() + low + torch.randn(side, side, generator=generator) * (noise * size / side)).bfloat16()
    return aligned.float() - base.float()


CASES = {"power law": (0.8, 0.5, 0.01), "slow decay": (0.3, 0.5, 0.003), "rounding noise": (0.8, 0.97, 0.001)}


PANEL_SHAPES = [(1024, 1024), (1024, 4096), (4096, 1024), (4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672)]


def panels() -> list[dict[str, object]]:
    """Seconds of block · A and block · A · Aᵀ for blocks of 8."""
    rows: list[dict[str, object]] = []
    for shape in PANEL_SHAPES:
        stored = torch.randn(shape)
        matrix = stored if shape[0] <= shape[1] else stored.T
        block = torch.randn(lanczos.SMALL_BLOCK, matrix.shape[0])
        seconds = {}
        limit = lanczos._CACHED_ENTRIES
        for name, cached in (("apart", stored.numel()), ("panels", 0)):
            lanczos._CACHED_ENTRIES = cached
            seconds[name] = median_seconds(lambda block=block, matrix=matrix: lanczos._there_and_back(block, matrix))  # type: ignore[misc]
        lanczos._CACHED_ENTRIES = limit
        used = "panels" if stored.numel() > limit else "apart"
        rows.append({"shape": shape, **seconds, "ratio": seconds["apart"] / seconds["panels"], "used": used})
        print(f"{shape!s:15s} apart {seconds['apart'] * 1e3:7.2f} ms  panels {seconds['panels'] * 1e3:7.2f} ms  "
              f"({seconds['apart'] / seconds['panels']:.2f}×), used: {used}", flush=True)  # fmt: skip
    return rows


LAYER = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def layer(cores: int) -> list[dict[str, object]]:
    """LoX of all matrices of a 4096-wide layer, as harden does it (a matrix to a core) and with torch.linalg.svd (all cores to a matrix)."""
    generator = torch.Generator().manual_seed(0)
    pairs = [matrix_pair(shape, generator) for shape in LAYER]
    outputs = [torch.empty_like(aligned) for _, aligned in pairs]

    def edit(base: torch.Tensor, aligned: torch.Tensor, out: torch.Tensor) -> None:
        delta, _, _ = form_delta(base, aligned)
        lox_edit(base, aligned, 6, 1.25, delta=delta, out=out)

    torch.set_num_threads(1)
    with ThreadPoolExecutor(cores) as crew:
        ours = median_seconds(lambda: list(crew.map(edit, *zip(*pairs, strict=True), outputs)))
    torch.set_num_threads(cores)
    print(f"the layer's {len(LAYER)} matrices: {ours:.2f} s", flush=True)
    seconds = []
    for base, aligned in pairs:
        started = time.perf_counter()
        left, values, right = torch.linalg.svd(aligned.float() - base.float(), full_matrices=False)
        (aligned.float() + 1.25 * (left[:, :6] * values[:6]) @ right[:6]).bfloat16()
        seconds.append(time.perf_counter() - started)
    print(f"with full SVD: {' + '.join(f'{one:.1f}' for one in seconds)} = {sum(seconds):.1f} s: {sum(seconds) / ours:.0f}×", flush=True)
    return [{"shapes": LAYER, "cores": cores, "seconds": ours, "full_svd_seconds": seconds, "times_faster": sum(seconds) / ours}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layer", action="store_true", help="only a layer of 7B shape")
    parser.add_argument("--panels", action="store_true", help="only compare ways to multiply")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.panels or arguments.layer:
        rows = panels() if arguments.panels else layer(arguments.threads)
        write(arguments.json, rows)
        return
    rows: list[dict[str, object]] = []
    for name, settings in CASES.items():
        matrix = delta(arguments.side, *settings)
        started = time.perf_counter()
        full = torch.linalg.svd(matrix, full_matrices=False)
        full_seconds = time.perf_counter() - started
        squares, vectors = torch.linalg.eigh(matrix.double() @ matrix.double().T)
        basis = vectors[:, -6:]
        exact = basis @ (basis.T @ matrix.double())
        gap = float((squares[-6] / squares[-7]).sqrt())

        def error(low: torch.Tensor, exact: torch.Tensor = exact) -> float:
            return float((low.double() - exact).norm() / exact.norm())

        def randomised(matrix: torch.Tensor = matrix) -> torch.Tensor:
            left, values, right = torch.svd_lowrank(matrix, q=14, niter=4)
            return (left[:, :6] * values[:6]) @ right[:, :6].T

        found = truncated_svd(matrix, 6)
        seconds = median_seconds(lambda matrix=matrix: truncated_svd(matrix, 6))  # type: ignore[misc]
        row = {
            "case": name,
            "gap": gap,
            "full_svd_seconds": full_seconds,
            "full_svd_error": error((full.U[:, :6] * full.S[:6]) @ full.Vh[:6]),
            "seconds": seconds,
            "times_faster": full_seconds / seconds,
            "error": error(found.low_rank()),
            "certified_error": (found.certificate.projection_error_bound or float("nan")) / float(exact.norm()),
            "ambiguous": found.certificate.ambiguous,
            "svd_lowrank_seconds": median_seconds(randomised),
            "svd_lowrank_error": error(randomised()),
        }
        rows.append(row)
        print(
            f"{name:15s} gap {gap - 1:6.2%}  full {full_seconds:6.1f} s  ours {seconds:6.3f} s ({row['times_faster']:.0f}×) error {row['error']:.1e} "
            f"(certified {row['certified_error']:.1e}{', ambiguous' if row['ambiguous'] else ''})  "
            f"svd_lowrank(q=14, niter=4) {row['svd_lowrank_seconds']:.3f} s error {row['svd_lowrank_error']:.1e}",
            flush=True,
        )
    write(arguments.json, rows)


def write(path: str | None, rows: list[dict[str, object]]) -> None:
    if path:
        Path(path).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
