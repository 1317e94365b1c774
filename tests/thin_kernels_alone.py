"""Programs for test_thin_kernels.py, each in a process of its own: how Triton runs kernels is settled when it is imported.

TRITON_INTERPRET=1 python tests/thin_kernels_alone.py run        what the kernels give on a CPU, as JSON
python tests/thin_kernels_alone.py build                         whether they can be built for a GPU that is not here
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lox_merge.maths import batched_spectral, thin_kernels, thin_products
from lox_merge.maths.block_qr import NEARLY, orthonormal_rows
from lox_merge.maths.rank import RankRule

MULTIPROCESSORS = 5
ARCHITECTURE = 90


def normal(*sides: int, seed: int = 0) -> Tensor:
    return torch.randn(*sides, generator=torch.Generator().manual_seed(seed))


def product_errors() -> dict[str, float]:
    """Largest relative error of a row, by shape (b, i, j, w, first); NaN where something was not written."""
    found = {}
    for count, summed, kept, width, first in [(3, 1300, 410, 8, 0), (2, 700, 130, 16, 0), (2, 64, 128, 8, 1), (1, 5, 7, 3, 2), (1, 1, 300, 1, 0)]:
        stored = normal(first + count, summed, kept)
        address = torch.tensor([stored.data_ptr()])
        for name, matrices, side, other in (("stored", stored, summed, kept), ("swapped", stored.mT, kept, summed)):
            rows, out = normal(count, width, side, seed=1), torch.full((count, width, other), math.nan)
            thin_kernels.rows_times(rows, matrices, out, address, first)
            expected = rows.double() @ matrices[first:].double()
            found[f"{name} {count} {summed} {kept} {width} {first}"] = float(((out - expected).norm(dim=2) / expected.norm(dim=2)).max())
    return found


def rows_errors() -> dict[str, float]:
    """Largest error of products of rows with rows, relative to the sizes of both, by shape (b, w, r, n) and what the others are."""
    found = {}
    for count, width, height, columns in [(2, 8, 64, 4500), (3, 16, 33, 700), (1, 3, 3, 1), (2, 8, 8, 513), (1, 8, 64, 70_000)]:
        rows = normal(count, width, columns)
        for dtype in (torch.float32, torch.float64):
            others = normal(count, height, columns, seed=1).to(dtype)
            expected = rows.double() @ others.double().mT
            sizes = rows.double().norm(dim=2)[:, :, None] * others.double().norm(dim=2)[:, None, :]
            difference = (thin_kernels.products_of_rows(rows, others) - expected).abs() / sizes
            found[f"{count} {width} {height} {columns} {dtype}"] = float(difference.max())
    return found


def blocks(width: int, columns: int) -> Tensor:
    """A plain one, a badly conditioned one, one with dependent rows, zeros, NaN, and one that was lost before."""
    given = normal(6, width, columns)
    given[1] *= torch.logspace(0, -5, width)[:, None]
    given[2, 1] = given[2, 0]
    given[2, 2] = 0
    given[3] = 0
    given[4, 0, 0] = math.nan
    return given


def orthonormal(width: int, columns: int) -> dict[str, Any]:
    """Two rounds by the kernel and by torch."""
    results = []
    for fast in (True, False):
        lost, block = torch.tensor([False] * 5 + [True]), blocks(width, columns)
        grams = []
        for nearly in (None, NEARLY):
            if fast:
                block, gram = thin_kernels.orthonormal_rows(block, lost, nearly)
            else:
                block, gram = orthonormal_rows(block, lost, nearly=nearly is not None)
            grams.append(gram)
        results.append((block, lost, grams[0]))
    (rows, lost, gram), (expected, expected_lost, expected_gram) = results
    good = ~expected_lost
    return {
        "lost": lost.tolist(),
        "expected_lost": expected_lost.tolist(),
        "of_lost": float(rows[lost].abs().max()),
        "difference": float((rows[good] - expected[good]).abs().max()),
        "skew": float((rows[good].double() @ rows[good].double().mT - torch.eye(width)).abs().max()),
        "gram": float((gram[:4] - expected_gram[:4]).abs().max() / expected_gram[:4].abs().max()),
    }


def whole() -> list[float]:
    """Relative errors of SVDs of a batch that go through the kernels, to both sides, against full ones."""
    shape, rank = (130, 150), 6
    planted = torch.arange(1, 131, dtype=torch.float32) ** -1.5
    matrices = torch.stack([torch.linalg.qr(normal(130, 130, seed=seed)).Q * planted @ normal(*shape, seed=seed) for seed in (1, 2)])
    norms = [float(matrix.double().norm()) for matrix in matrices]
    errors = []
    for matrix, subspace in zip(matrices, batched_spectral.batched_truncated_svd(matrices, RankRule("fixed", rank), norms=norms), strict=True):
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        exact = (left[:, :rank] * values[:rank]) @ right[:rank]
        errors.append(float((subspace.low_rank().double() - exact).norm()) / float(exact.norm()))
        assert subspace.certificate.method == "lanczos"
    return errors


def run() -> dict[str, Any]:
    # As on a GPU: the summed side is split among multiprocessors, and the kernels are taken.
    thin_kernels._multiprocessors = lambda device: MULTIPROCESSORS
    splits = set[int]()
    chosen = thin_kernels._splits

    def noted(*arguments: int) -> int:
        splits.add(chosen(*arguments))
        return chosen(*arguments)

    thin_kernels._splits = noted
    report: dict[str, Any] = {"products": product_errors(), "rows": rows_errors()}
    # One program for a block, two, and as many as there may be, each with several steps.
    report["orthonormal"] = [orthonormal(3, 70), orthonormal(8, 500), orthonormal(16, 700), orthonormal(8, 20_000)]
    report["splits"] = sorted(splits)
    taken = Counter[str]()
    for name in ("rows_times", "products_of_rows", "orthonormal_rows"):
        setattr(thin_kernels, name, partial(_counted, taken, name, getattr(thin_kernels, name)))
    thin_products._built = lambda device: thin_kernels
    report["svd"], report["calls"] = whole(), dict(taken)
    return report


def _counted(calls: Counter[str], name: str, kernel: Callable[..., Any], *arguments: Any) -> Any:
    calls[name] += 1
    return kernel(*arguments)


def build() -> dict[str, Any]:
    """Shared memory and whether the matrix units are used, by kernel, as for a data-centre GPU (3 stages) and for a consumer one (2)."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = {}
    for stages in (3, 2):
        options = thin_kernels.options_for(torch.device("cpu")) | {"num_stages": stages}
        settings = ASTSource, compile_kernel, options, GPUTarget("cuda", ARCHITECTURE, 32)
        types = {"rows": "*fp32", "address": "*i64", "out": "*fp32", "first": "i32", "summed": "i32", "kept": "i32", "width": "i32"}
        sides = {"SUMMED": thin_kernels._SUMMED, "KEPT": thin_kernels._KEPT, "SPLITS": 2}
        for swapped in (False, True):
            found[f"product {stages} {swapped}"] = _built(*settings, thin_kernels._rows_times, types, sides | {"SWAPPED": swapped})
        types = {"left": "*fp32", "right": "*fp32", "parts": "*fp64"} | dict.fromkeys(("width", "height", "columns", "steps"), "i32")
        sides = {"HEIGHT": 16, "COLUMNS": thin_kernels._COLUMNS}
        found[f"rows {stages}"] = _built(*settings, thin_kernels._products_of_rows, types, sides)
        sides = {"HEIGHT": thin_kernels.LARGEST_HEIGHT, "COLUMNS": thin_kernels._COLUMNS_OF_MANY}
        found[f"images {stages}"] = _built(*settings, thin_kernels._products_of_rows, types | {"right": "*fp64"}, sides)
        types = {"rows": "*fp32", "parts": "*fp64", "out": "*fp32", "gram": "*fp64", "lost": "*i8"}
        types |= dict.fromkeys(("width", "columns", "steps", "splits"), "i32")
        constants = {"CHECK": True, "TOLERANCE": NEARLY, "COLUMNS": thin_kernels._COLUMNS, "PARTS": thin_kernels._MOST_PROGRAMS}
        found[f"orthonormal {stages}"] = _built(*settings, thin_kernels._orthonormal, types, constants)
    return found


def _built(
    source: Any, compile_kernel: Any, options: dict[str, Any], target: Any, kernel: Any, types: dict[str, str], constants: dict[str, Any]
) -> dict[str, Any]:
    signature = types | dict.fromkeys(constants, "constexpr")
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(types) if name not in ("first", "width", "height", "steps", "splits")}
    built = compile_kernel(source(kernel, signature, constexprs=constants, attrs=aligned), target=target, options=options)
    return {"shared": built.metadata.shared, "matrix_units": built.asm["ptx"].count("mma")}


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of what is lost
    print(json.dumps({"run": run, "build": build}[sys.argv[1]]()))
